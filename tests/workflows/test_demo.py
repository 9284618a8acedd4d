"""The demo: a picture, a report and numbers for each model; a missing model is named."""

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
    result = demo(tmp_path, iters=1, acts=acts)
    assert result["missing"] == ["zoo:nowhere"]
    act = result["acts"][0]
    names = [row["name"] for row in act["rows"]]
    assert names == ["Original", "minmax, W4A8", "tfmq, W4A8", "best, W4A8"]
    assert all(10 < row["psnr"] < 80 for row in act["rows"][1:])
    assert act["rows"][1]["bytes"] < act["rows"][0]["bytes"] / 2
    assert Image.open(act["picture"]).width > 1000
    assert Path(act["report"]).read_text().startswith("<!doctype html>")
    lines = "\n".join(text.demonstrated(result))
    assert act["picture"] in lines and act["report"] in lines
    assert "zoo:nowhere is not here" in lines
    places = sorted(path.name for path in (tmp_path / "digits").iterdir())
    assert places == ["best", "demo.png", "evidence", "lowtide-files.json", "minmax", "tfmq"]
