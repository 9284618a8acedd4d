"""Comparisons that were interrupted go on to the same evidence; finished ones do nothing."""

import json
import shutil
from pathlib import Path

import pytest
from packed_pair import pair
from stopped_calls import Stopped, counted_calls

import lowtide
from lowtide import sampling
from lowtide.checkpoint import folders
from lowtide.evaluation import compared_models, sampling_turns
from lowtide.evaluation.interrupted import Digests, digests_of, finished_evidence
from lowtide.evaluation.scores import measurement_plan
from lowtide.report.evidence import read
from lowtide.settings import EvaluationSettings

STEPS = 3
OPTIONS = {"seeds": (3, 5, 6), "batch": 2}


def evidence(folder: Path) -> dict:
    """The evidence without times, and without what the races of kernels say."""
    found = json.loads((folder / "evidence.json").read_text())
    for name in ("command", "date"):
        del found[name]
    for model in found["models"].values():
        del model["seconds_per_step"]
        for layer in model.get("bits", []):
            del layer["kernel"]
    return found


def pictures(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.png")}


def evaluated(out, **changes):
    return lowtide.evaluate(pair()[1], out=out, **OPTIONS | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The evidence of a command that nobody stopped."""
    out = tmp_path_factory.mktemp("whole") / "evidence"
    evaluated(out)
    return out


def stopped(out, patch, stop, **changes) -> None:
    with patch.context() as each, pytest.raises(Stopped):
        counted_calls(each, stop)
        evaluated(out, **changes)


# The reference draws 2 images, then the packed model; then both draw 1. Then layers are compared.
@pytest.mark.parametrize("stop", [3 * STEPS + 1, 4 * STEPS])
def test_finished_batches_are_not_drawn_again(stop, whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    stopped(out, monkeypatch, stop)
    assert not out.exists()
    capsys.readouterr()
    drawn: list[int] = []
    sample_batch = sampling_turns.sample_batch
    monkeypatch.setattr(
        sampling_turns,
        "sample_batch",
        lambda pipe, request: drawn.append(len(request.seeds)) or sample_batch(pipe, request),
    )
    evaluated(out)
    assert drawn == [2, 2, 1, 1][stop // STEPS :]
    assert "going on where an earlier run stopped" in capsys.readouterr().err
    assert evidence(out) == evidence(whole)
    assert pictures(out) == pictures(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_other_metrics_take_the_images_that_were_drawn(whole, tmp_path, monkeypatch):
    stopped(tmp_path / "x", monkeypatch, 4 * STEPS)
    monkeypatch.setattr(
        sampling_turns, "sample_batch", lambda pipe, request: pytest.fail("drawn again")
    )
    found = evaluated(tmp_path / "x", metrics=("psnr",)).evidence.models["minmax-w4a8"]
    assert found.metrics == {"psnr": read(whole).models["minmax-w4a8"].metrics["psnr"]}


def test_a_finished_evaluation_does_nothing(whole, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        calls = counted_calls(patch)
        again = evaluated(whole)
    assert calls.counted == []
    words = "holds this evidence: the same models, settings and code. Nothing is done.\n"
    assert f"{whole} {words}" in capsys.readouterr().err
    assert again.folder == whole and list(again.evidence.models) == [
        "model-in-float",
        "minmax-w4a8",
    ]


def test_what_makes_other_evidence_is_done(whole, tmp_path):
    models = compared_models.distinct([compared_models.load(source) for source in pair()])

    def digests(steps=3, title="x", **changes):
        plan = measurement_plan(EvaluationSettings(**changes))
        return digests_of(models, sampling.Request(steps=steps), plan, title)

    first = digests()
    assert first == digests()
    for change in ({"metrics": ("psnr",)}, {"min_psnr": 1.0}, {"metrics": ("psnr", "ssim")}):
        other = digests(**change)
        assert other.images == first.images and other.evidence != first.evidence
    for change in ({"steps": 2}, {"title": "y"}):
        other = digests(**change)
        assert other.images != first.images and other.evidence != first.evidence
    out = shutil.copytree(whole, tmp_path / "x")
    written = Digests("", read(out).run)
    assert finished_evidence(out, written) == read(out)
    assert finished_evidence(out, first) is None
    page = out / "report.html"
    page.write_text(page.read_text() + " ")
    assert finished_evidence(out, written) is None


def test_a_damaged_record_is_made_anew(whole, tmp_path, monkeypatch, capsys):
    out = tmp_path / "x"
    stopped(out, monkeypatch, 3 * STEPS + 1)
    records = sorted((tmp_path / "x.run").rglob("*.safetensors"))
    assert [each.stem for each in records] == [
        "images-from-3-minmax-w4a8",
        "images-from-3-model-in-float",
        "path-from-6",
    ]
    for record in records:
        data = bytearray(record.read_bytes())
        data[-3] ^= 4
        record.write_bytes(data)
    evaluated(out)
    assert capsys.readouterr().err.count("is damaged") == 3
    assert evidence(out) == evidence(whole) and pictures(out) == pictures(whole)


def test_models_in_memory_are_not_taken_up():
    """A program can change them in ways that their weights do not show."""
    model, packed = pair()
    plan = measurement_plan(EvaluationSettings())
    loaded = [compared_models.load(model), compared_models.load(packed)]
    assert digests_of(loaded, sampling.Request(), plan, "x") is not None
    held = [loaded[0], compared_models.load(loaded[1].pipe)]
    assert digests_of(held, sampling.Request(), plan, "x") is None


def test_an_evaluation_that_was_stopped_inside_a_model_is_no_obstacle(tmp_path, monkeypatch):
    packed = shutil.copytree(pair()[1], tmp_path / "packed")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        counted_calls(patch, 2 * STEPS + 1)
        lowtide.evaluate(packed, **OPTIONS)
    assert (packed / "evidence.run").is_dir()
    folders.check_place(packed)
    (packed / "mine.run").mkdir()
    (packed / "mine.run" / "thesis.txt").write_text("ten years of work")
    with pytest.raises(lowtide.BadInput, match=r"first: mine\.run"):
        folders.check_place(packed)
