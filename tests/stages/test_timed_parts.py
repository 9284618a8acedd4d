"""Fitting weights and ranges goes on where it stopped, to the same bits."""

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.settings import Settings
from lowtide.stages import fit_ranges, fit_weights, timed_parts
from lowtide.stages.base import Job

OPTIONS = {"steps": 4, "images": 2}
STAGES = ("FitWeights", "InputStatistics", "FitRanges")


class Stopped(BaseException):
    """A kill, as far as a process can survive one."""


def run(folder, method="ptq4dm", **changes):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    return lowtide.quantize(pipe, method=method, folder=folder, **OPTIONS | changes).model


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def counted(patch, place, name, stop=None) -> list[int]:
    """Count the calls of a function; the call of this number stops the run."""
    calls: list[int] = []
    own = getattr(place, name)

    def counting(*args, **options):
        if len(calls) == stop:
            raise Stopped
        calls.append(len(calls))
        return own(*args, **options)

    patch.setattr(place, name, counting)
    return calls


PARTS = {
    "FitWeights": (fit_weights, "_weight_range"),
    "InputStatistics": (fit_ranges, "run_call"),
    "FitRanges": (fit_ranges, "ranges"),
}


@pytest.fixture(scope="module")
def whole():
    """The bits of each method without a folder, and the parts of each stage."""
    found = {}
    for method in ("minmax", "ptq4dm"):
        with pytest.MonkeyPatch.context() as patch:
            calls = {stage: counted(patch, *place) for stage, place in PARTS.items()}
            weights = bits(run(None, method))
        found[method] = weights, {stage: len(each) for stage, each in calls.items()}
    return found


# minmax keeps no samples of the inputs, ptq4dm does.
CASES = [("minmax", "InputStatistics"), *(("ptq4dm", stage) for stage in STAGES)]


@pytest.mark.parametrize(("method", "stage"), CASES)
def test_what_was_fitted_is_not_fitted_again(whole, method, stage, tmp_path, monkeypatch):
    expected, parts = whole[method]
    seconds = iter(range(10**6))
    # Every third part is due.
    monkeypatch.setattr(timed_parts.time, "monotonic", lambda: float(next(seconds)))
    monkeypatch.setattr(timed_parts, "SECONDS", 3.0)
    stop = parts[stage] - 1
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        counted(patch, *PARTS[stage], stop)
        run(tmp_path, method)
    records = list(tmp_path.glob(f"*/units/{stage}-*"))
    assert 1 <= len(records) <= stop / 2
    with monkeypatch.context() as patch:
        again = counted(patch, *PARTS[stage])
        resumed = bits(run(tmp_path, method))
    assert 1 <= len(again) <= 4
    assert equal(resumed, expected)


def test_a_damaged_record_is_made_anew(whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timed_parts, "SECONDS", 0.0)
    run(tmp_path)
    for stage in STAGES:
        records = sorted(tmp_path.glob(f"*/units/{stage}-*"))
        for record in (records[0], records[-1]):
            data = bytearray(record.read_bytes())
            data[-3] ^= 4
            record.write_bytes(data)
    capsys.readouterr()
    assert equal(bits(run(tmp_path)), whole["ptq4dm"][0])
    assert capsys.readouterr().err.count("is damaged") == 2 * len(STAGES)


def test_a_small_run_keeps_no_parts(tmp_path):
    run(tmp_path, "minmax")
    names = [path.name for path in tmp_path.glob("*/units/*")]
    assert names and not [name for name in names if name.startswith(STAGES)]


def test_what_is_fitted_twice_has_records_of_its_own(tmp_path, monkeypatch):
    """QDrop fits input ranges before it learns the weights, and afterwards."""
    monkeypatch.setattr(timed_parts, "SECONDS", 0.0)
    model = tiny.model("unet2d")

    def fitted(*answers: float) -> list[float]:
        job = Job(None, model, None, Settings(), "test", tmp_path)
        left = iter(answers)

        def search(name: str):
            answer = torch.full((1,), next(left))
            return answer, answer + 1

        turns = [timed_parts.bounds_of_each(job, "Fit", ["a"], search) for _ in answers]
        return [turn["a"][0].item() for turn in turns]

    assert fitted(0.0, 1.0) == [0, 1]
    assert fitted(5.0, 6.0) == [0, 1]
