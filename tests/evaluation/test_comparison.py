"""The evidence folder: complete, true to the models, whole or absent; bad inputs are refused."""

import json
import shutil

import numpy as np
import pytest
import tiny
import tiny_pipelines
from packed_pair import QUICK, pair
from PIL import Image

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation import compared_models
from lowtide.evaluation.comparison import evaluate_model
from lowtide.evaluation.metrics import psnr
from lowtide.methods import relevant_options
from lowtide.report.evidence import read
from lowtide.report.wording import figures, size
from lowtide.settings import EvaluationSettings
from lowtide.workflows import to_folder

SEEDS = (3, 5, 6)
PACKED = "minmax-w4a8"


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated") / "evidence"
    return lowtide.evaluate(pair()[1], out=out, seeds=SEEDS, batch=2, gates={"min-psnr": 5.0})


def pictures(folder) -> np.ndarray:
    return np.stack([np.asarray(Image.open(folder / f"{seed}.png")) for seed in SEEDS])


def sampled(folder) -> np.ndarray:
    request = sampling.Request(steps=3, seeds=SEEDS, batch=2)
    return sampling.images(sampling.load_pipeline(folder), request)


def test_the_folder_has_the_samples(evaluated):
    folder = evaluated.folder / "images"
    theirs, ours = map(sampled, pair())
    for key, images in {"model-in-float": theirs, PACKED: ours}.items():
        assert np.abs(pictures(folder / key) - (images * 255).round()).max() <= 1
    packed = evaluated.evidence.models[PACKED]
    measured = packed.metrics["psnr"]
    assert measured.value == pytest.approx(psnr(ours, theirs), rel=1e-4)
    singles = [psnr(ours[k : k + 1], theirs[k : k + 1]) for k in range(3)]
    assert packed.per_image["psnr"] == pytest.approx(singles, rel=1e-4)
    assert measured.low <= measured.value <= measured.high


def test_the_report_reads_the_json(evaluated):
    evidence = read(evaluated.folder)
    assert [model.kind for model in evidence.models.values()] == ["float", "lowtide"]
    assert evidence.reference == "model-in-float"
    assert evidence.request.seeds == SEEDS
    packed = evidence.models[PACKED]
    assert packed.bytes < evidence.base.bytes / 2
    assert packed.trajectory.table().error.shape == (1, 3)
    assert packed.layers.table().error.shape[1] == 3
    assert packed.temporal.table().error.shape[1] == 3
    assert {layer.weights for layer in packed.bits} == {4, 8}
    assert set(packed.predicted) == set(packed.real) == {"bytes", "peak_bytes", "minutes"}
    assert packed.predicted["bytes"] == pytest.approx(packed.real["bytes"], rel=0.01)
    assert sum(packed.stages.values()) > 0
    assert packed.left
    assert 0 < packed.float_share < 0.5
    assert "</html>" in evaluated.report.read_text()
    assert evidence == evaluated.evidence
    contents = evaluated.as_json()
    places = {"folder": contents.pop("folder"), "report": contents.pop("report")}
    assert places == {"folder": str(evaluated.folder), "report": str(evaluated.report)}
    assert json.loads((evaluated.folder / "evidence.json").read_text()) == contents


def test_the_repr_is_one_line(evaluated):
    base, packed = evaluated.evidence.models.values()
    result = f"{size(packed.bytes)}, PSNR {figures(packed.psnr)} dB"
    models = f"model in float: {size(base.bytes)}; minmax W4A8: {result}"
    assert repr(evaluated) == f"Evaluation({models}; in {evaluated.folder})"


def test_a_gate_that_passes_and_one_that_fails(evaluated, tmp_path):
    (passing,) = evaluated.evidence.gates
    assert passing.passed
    assert passing.value == evaluated.evidence.models[PACKED].psnr > 5
    failed = lowtide.evaluate(pair()[1], out=tmp_path / "x", seeds=(1,), gates={"min-psnr": 99.0})
    assert not failed.evidence.gates[0].passed


def test_settings_in_one_object_give_the_same(evaluated, tmp_path):
    settings = EvaluationSettings(seeds=SEEDS, batch=2, min_psnr=5.0)
    evidence = evaluate_model(pair()[1], settings, out=tmp_path / "x").evidence
    assert evidence.gates == evaluated.evidence.gates
    assert evidence.request == evaluated.evidence.request
    metrics = evaluated.evidence.models[PACKED].metrics
    assert evidence.models[PACKED].metrics == metrics


def test_without_a_record_the_reference_is_needed_and_changes_nothing(evaluated, tmp_path):
    model, packed = pair()
    bare = shutil.copytree(packed, tmp_path / "bare")
    (bare / "lowtide.json").unlink()
    with pytest.raises(BadInput, match=r"no lowtide.json.*--reference"):
        lowtide.evaluate(bare, seeds=SEEDS, steps=3)
    evaluation = lowtide.evaluate(bare, reference=model, seeds=SEEDS, batch=2, steps=3)
    measured = evaluation.as_json()["models"][PACKED]
    known = evaluated.as_json()["models"][PACKED]
    for name in ("metrics", "trajectory", "layers", "temporal", "bits"):
        assert measured[name] == known[name]
    assert "stages" not in measured
    assert (bare / "evidence" / "report.html").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "lowtide.json unreadable"),
        ('{"version": 1, "command"', "lowtide.json unreadable"),
        ("[]", "lowtide.json unreadable"),
        ('{"version": 1}', "lowtide.json unreadable"),
    ],
)
def test_a_damaged_record(content, words, tmp_path):
    run = shutil.copytree(pair()[1], tmp_path / "run")
    (run / "lowtide.json").write_text(content)
    with pytest.raises(BadInput, match=words):
        lowtide.evaluate(run, seeds=(1,))
    assert not (run / "evidence").exists()


def test_a_record_with_a_setting_of_the_wrong_type(tmp_path):
    run = shutil.copytree(pair()[1], tmp_path / "run")
    record = json.loads((run / "lowtide.json").read_text())
    record["settings"]["steps"] = "three"
    (run / "lowtide.json").write_text(json.dumps(record))
    with pytest.raises(BadInput, match=r"found in lowtide.json steps 'three'; expected a whole"):
        lowtide.evaluate(run, seeds=(1,))


def test_other_weights_than_those_that_were_quantized(tmp_path):
    model = sampling.as_pipeline(tiny.model("unet2d"))
    model.save_pretrained(tmp_path / "model")
    to_folder.quantize_to_folder(
        str(tmp_path / "model"), tmp_path / "run", "minmax", relevant_options("minmax", QUICK)
    )
    sampling.as_pipeline(tiny.model("unet2d", seed=1)).save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="other weights"):
        lowtide.evaluate(tmp_path / "run", seeds=(1,))


def test_steps_that_the_packed_model_was_not_calibrated_for(tmp_path):
    """Images are of these steps; temporal features are compared at the calibrated ones."""
    packed = pair("tfmq")[1]
    with pytest.warns(UserWarning, match="timesteps"):
        result = lowtide.evaluate(packed, seeds=(1,), steps=4, out=tmp_path / "evidence")
    evidence = result.evidence
    assert evidence.request.steps == 4
    [temporal] = [model.temporal for model in evidence.models.values() if model.temporal]
    assert len(temporal.timesteps) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gates": {"min-psnr": float("nan")}}, "found min_psnr nan"),
        ({"seeds": (0, 0)}, "found seed 0 twice"),
        ({"steps": 0}, "found steps 0"),
    ],
)
def test_wrong_settings_are_refused_before_a_model_is_loaded(options, words):
    with pytest.raises(BadInput, match=words):
        lowtide.evaluate("no-such-folder", **options)
    with pytest.raises(BadInput, match=words):
        lowtide.compare("no-such-folder", "another", **options)


def test_a_float_model_cannot_be_evaluated():
    with pytest.raises(BadInput, match="found a float model"):
        lowtide.evaluate(pair()[0], reference=pair()[0])


def test_a_model_in_memory_needs_a_folder():
    packed = sampling.load_pipeline(pair()[1])
    with pytest.raises(BadInput, match="found no folder to write to"):
        lowtide.evaluate(packed, reference=pair()[0])


def test_compare_mixes_kinds_and_finds_the_float_reference(tmp_path):
    model, packed = pair()
    peer = sampling.load_pipeline(model)
    peer.unet.is_quantized = True
    peer.unet.register_to_config(quantization_config={"quant_method": "quanto"})
    out = tmp_path / "x"
    evidence = lowtide.compare(packed, peer, model, packed, out=out, seeds=(1, 2)).evidence
    assert evidence.reference == "model-in-float"
    kinds = [each.kind for each in evidence.models.values()]
    assert kinds == ["float", "lowtide", "peer", "lowtide"]
    _, ours, theirs, again = evidence.models.values()
    assert theirs.psnr == 100
    assert max(theirs.trajectory.error) == 0
    assert max(max(row) for row in theirs.layers.error) == 0
    assert ours.metrics == again.metrics
    assert ours.psnr < 90
    assert ours.trajectory == again.trajectory


def test_another_reference_and_none_in_float(tmp_path):
    packed = pair()[1]
    finer = pair(weights=8)[1]
    evaluation = lowtide.compare(packed, finer, out=tmp_path / "x", seeds=(1,), reference=finer)
    evidence = evaluation.as_json()
    assert evidence["reference"] == "minmax-w8a8"
    assert list(evidence["models"]) == ["minmax-w8a8", PACKED]
    assert "temporal" not in evidence["models"]["minmax-w8a8"]
    assert evidence["models"][PACKED]["temporal"] is None
    first = lowtide.compare(packed, finer, out=tmp_path / "y", seeds=(1,))
    assert first.evidence.reference == PACKED


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_pipelines_with_guidance_text_and_decoders(name, tmp_path):
    original, packed = (tiny_pipelines.PIPELINES[name](tmp_path) for _ in range(2))
    conditions = tiny_pipelines.request_fields(name)
    result = lowtide.quantize(
        packed, method="minmax", **relevant_options("minmax", QUICK | conditions)
    )
    request = {"steps": 3, "seeds": (0, 1, 2), "batch": 2} | conditions
    evidence = lowtide.compare(original, result, out=tmp_path / "x", **request).evidence
    _, ours = evidence.models.values()
    assert 0 < ours.metrics["latent_mse"].value < 100
    assert len(ours.trajectory.error) == 3
    assert 0 < ours.trajectory.error[-1] < 1
    assert len(ours.layers.names) > 10
    (texts,) = (texts for kind, texts in conditions.items() if kind != "size")
    assert evidence.captions == [str(texts[seed % len(texts)]) for seed in range(3)]


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


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("ten years of work")
    with pytest.raises(BadInput, match="other files"):
        lowtide.compare(*pair(), out=tmp_path, seeds=(1,))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("run", [lowtide.compare, lowtide.evaluate])
def test_a_place_that_is_not_ours_is_refused_before_a_model_is_loaded(run, tmp_path, monkeypatch):
    """A refusal after the sampling would cost its whole time."""
    (tmp_path / "thesis.txt").write_text("ten years of work")
    monkeypatch.setattr(compared_models, "load", lambda _: pytest.fail("a model was loaded"))
    sources = ("zoo:digits", "x") if run is lowtide.compare else ("x",)
    with pytest.raises(BadInput, match=r"thesis\.txt"):
        run(*sources, out=tmp_path, seeds=SEEDS)
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"
