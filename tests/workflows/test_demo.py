"""The demo: for each model that is here a picture, a report and numbers; what is not here is named, not skipped in silence."""

from pathlib import Path

from PIL import Image

from lowtide.report import text
from lowtide.workflows.demo import ACTS, Act, demo


def test_the_acts_are_digits_and_emoji():
    assert [act.model for act in ACTS] == ["zoo:digits", "zoo:emoji"]
    assert len(ACTS[1].prompts) == ACTS[1].images


def test_a_small_demo_draws_and_tells(tmp_path):
    acts = (
        Act("zoo:digits", "digits", steps=2, images=2, methods=("minmax", "tfmq", "best")),
        Act("zoo:nowhere", "none", 2, 2),
    )
    found = demo(tmp_path, iters=1, acts=(acts))
    assert found["missing"] == ["zoo:nowhere"]
    act = found["acts"][0]
    assert [row["name"] for row in act["rows"]] == [
        "Original",
        "minmax, W4A8",
        "tfmq, W4A8",
        "best, W4A8",
    ]
    assert all(10 < row["psnr"] < 80 for row in act["rows"][1:])
    assert act["rows"][1]["bytes"] < act["rows"][0]["bytes"] / 2
    assert Image.open(act["picture"]).width > 1000
    assert Path(act["report"]).read_text().startswith("<!doctype html>")
    told = "\n".join(text.demonstrated(found))
    assert act["picture"] in told and act["report"] in told and "zoo:nowhere is not here" in told
