"""The evidence folder: complete, true to the models, whole or not there, and refused in one sentence when it cannot be."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pipelines
from packed_pair import QUICK, pair
from PIL import Image

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation.metrics import psnr
from lowtide.report.page.evidence import read
from lowtide.workflows import to_folder

SEEDS = (3, 5, 6)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "evidence"
    return lowtide.evaluate(pair()[1], out=out, seeds=SEEDS, batch=2, gates={"min-psnr": 5.0})


def pictures(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{seed}.png")) for seed in SEEDS])


def test_the_folder_holds_what_was_drawn(evaluated):
    out = Path(evaluated["folder"])
    request = sampling.Request(steps=3, seeds=SEEDS, batch=2)
    drawn = [sampling.images(sampling.load_pipeline(folder), request) for folder in pair()]
    for key, images in zip(("model-in-float", "minmax-w4a8"), drawn, strict=True):
        assert np.abs(pictures(out / "images" / key) - (images * 255).round()).max() <= 1
    found = evaluated["models"]["minmax-w4a8"]
    assert found["metrics"]["psnr"]["value"] == pytest.approx(psnr(drawn[1], drawn[0]), rel=1e-4)
    assert found["per_image"]["psnr"] == pytest.approx(
        [psnr(drawn[1][k : k + 1], drawn[0][k : k + 1]) for k in range(3)], rel=1e-4
    )
    assert (
        found["metrics"]["psnr"]["low"]
        <= found["metrics"]["psnr"]["value"]
        <= found["metrics"]["psnr"]["high"]
    )


def test_the_json_is_what_the_page_reads(evaluated):
    told = read(Path(evaluated["folder"]))
    assert [model.kind for model in told.models] == ["float", "lowtide"]
    assert told.reference.key == "model-in-float" and told.seeds == SEEDS
    packed = told.models[1]
    assert packed.bytes < told.reference.bytes / 2
    assert packed.trajectory.error.shape == (1, 3) and packed.layers.error.shape[1] == 3
    assert packed.temporal.error.shape[1] == 3
    assert {layer.weights for layer in packed.bits} == {4, 8}
    assert set(packed.predicted) == set(packed.real) == {"bytes", "peak_bytes", "minutes"}
    assert packed.predicted["bytes"] == pytest.approx(packed.real["bytes"], rel=0.01)
    assert sum(packed.stages.values()) > 0 and packed.left and 0 < packed.float_share < 0.5
    assert "</html>" in (told.folder / "report.html").read_text()
    assert json.loads((told.folder / "evidence.json").read_text()) == {
        name: value for name, value in evaluated.items() if name not in ("folder", "report")
    }


def test_a_gate_that_is_kept_and_one_that_is_not(evaluated, tmp_path):
    (kept,) = evaluated["gates"]
    assert (
        kept["passed"]
        and kept["value"] == evaluated["models"]["minmax-w4a8"]["metrics"]["psnr"]["value"] > 5
    )
    lost = lowtide.evaluate(pair()[1], out=tmp_path / "x", seeds=(1,), gates={"min-psnr": 99.0})
    assert not lost["gates"][0]["passed"]


def test_without_a_record_the_reference_must_be_given_and_changes_nothing(evaluated, tmp_path):
    model, packed = pair()
    bare = shutil.copytree(packed, tmp_path / "bare")
    (bare / "lowtide.json").unlink()
    with pytest.raises(BadInput, match=r"no lowtide.json.*--reference"):
        lowtide.evaluate(bare, seeds=SEEDS, steps=3)
    found = lowtide.evaluate(bare, reference=model, seeds=SEEDS, batch=2, steps=3)["models"][
        "minmax-w4a8"
    ]
    known = evaluated["models"]["minmax-w4a8"]
    for name in ("metrics", "trajectory", "layers", "temporal", "bits"):
        assert found[name] == known[name]
    assert "stages" not in found and (bare / "evidence" / "report.html").exists()


def test_other_weights_than_those_that_were_quantized(tmp_path):
    model = sampling.as_pipeline(tiny.model("unet2d"))
    model.save_pretrained(tmp_path / "model")
    to_folder.quantize_to_folder(str(tmp_path / "model"), tmp_path / "run", "minmax", QUICK)
    sampling.as_pipeline(tiny.model("unet2d", seed=1)).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="other weights"):
        lowtide.evaluate(tmp_path / "run", seeds=(1,))


def test_steps_that_the_packed_model_does_not_know():
    with pytest.raises(BadInput, match=r"4 steps.*the 3 it was calibrated for"):
        lowtide.evaluate(pair("tfmq")[1], seeds=(1,), steps=4)


def test_a_float_model_is_nothing_to_evaluate():
    with pytest.raises(BadInput, match="found a float model"):
        lowtide.evaluate(pair()[0], reference=pair()[0])


def test_compare_mixes_kinds_and_finds_the_float_reference(tmp_path):
    model, packed = pair()
    peer = sampling.load_pipeline(model)
    peer.unet.is_quantized = True
    peer.unet.register_to_config(quantization_config={"quant_method": "quanto"})
    found = lowtide.compare(packed, peer, model, packed, out=tmp_path / "x", seeds=(1, 2))
    assert found["reference"] == "model-in-float"
    assert [each["kind"] for each in found["models"].values()] == [
        "float",
        "lowtide",
        "peer",
        "lowtide",
    ]
    ours, theirs, again = [each for key, each in found["models"].items() if key != "model-in-float"]
    assert theirs["metrics"]["psnr"]["value"] == 100 and max(theirs["trajectory"]["error"]) == 0
    assert max(max(row) for row in theirs["layers"]["error"]) == 0
    assert ours["metrics"] == again["metrics"] and ours["metrics"]["psnr"]["value"] < 90
    assert ours["trajectory"] == again["trajectory"]


def test_another_reference_and_none_in_float(tmp_path):
    packed, finer = pair()[1], pair(weights=8)[1]
    found = lowtide.compare(packed, finer, out=tmp_path / "x", seeds=(1,), reference=finer)
    assert found["reference"] == "minmax-w8a8" and list(found["models"]) == [
        "minmax-w8a8",
        "minmax-w4a8",
    ]
    assert (
        "temporal" not in found["models"]["minmax-w8a8"]
        and found["models"]["minmax-w4a8"]["temporal"] is None
    )
    assert (
        lowtide.compare(packed, finer, out=tmp_path / "y", seeds=(1,))["reference"] == "minmax-w4a8"
    )


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_pipelines_with_guidance_text_and_decoders(name, tmp_path):
    original, packed = (tiny_pipelines.PIPELINES[name](tmp_path) for _ in range(2))
    asked = tiny_pipelines.asked(name)
    result = lowtide.quantize(packed, method="minmax", **QUICK | asked)
    found = lowtide.compare(
        original, result, out=tmp_path / "x", steps=3, seeds=(0, 1, 2), batch=2, **asked
    )
    _, ours = found["models"].values()
    assert 0 < ours["metrics"]["latent_mse"]["value"] < 100
    assert len(ours["trajectory"]["error"]) == 3 and 0 < ours["trajectory"]["error"][-1] < 1
    assert len(ours["layers"]["names"]) > 10
    assert found["captions"] == [
        str(asked[kind][seed % len(asked[kind])])
        for seed in range(3)
        for kind in asked
        if kind != "size"
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sample_size": 16}, "sample size 16"),
        ({"num_class_embeds": 4}, "ClassConditionalPipeline"),
        ({"in_channels": 1}, "in channels 1"),
    ],
)
def test_models_that_cannot_be_compared(change, words, tmp_path):
    other = sampling.as_pipeline(tiny.unet2d(**change))
    with pytest.raises(BadInput, match=words):
        lowtide.compare(pair()[0], other, out=tmp_path / "x", seeds=(1,), labels=(1,))
    assert not (tmp_path / "x").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(BadInput, match="other files"):
        lowtide.compare(*pair(), out=tmp_path, seeds=(1,))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
