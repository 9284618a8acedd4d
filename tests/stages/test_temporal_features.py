"""The rows that a temporal unit runs on when there are more than it runs at once."""

import itertools

import pytest
import tiny
import tiny_pipelines
import torch

from lowtide import sampling
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.temporal_features import MOST_ROWS, JobFeatures, bounded, temporal_errors


def rows(steps: int, conditions: int) -> list[dict[str, torch.Tensor]]:
    """Rows in the order of calls: one step after the other, each with all its conditions."""
    pairs = itertools.product(range(steps), range(conditions))
    return [
        {"timestep": torch.tensor(step), "class_labels": torch.tensor(condition)}
        for step, condition in pairs
    ]


def test_a_bound_drops_no_condition_and_no_step():
    """Every fourth row of 50 steps with 32 conditions gives the same eight conditions each time."""
    many = rows(50, 32)
    kept = bounded(many, torch.Generator().manual_seed(0))
    assert len(kept) == MOST_ROWS
    assert {int(row["class_labels"]) for row in kept} == set(range(32))
    assert {int(row["timestep"]) for row in kept} == set(range(50))
    places = [many.index(row) for row in kept]
    assert places == sorted(set(places))


def test_few_rows_are_all_kept():
    few = rows(4, 5)
    assert bounded(few, torch.Generator()) is few


def prepared(pipe, **settings) -> Job:
    model = sampling.denoiser(pipe)
    options = {"steps": 3, "images": 4, "inputs": 4, "calibration_steps": 1} | settings
    job = Job(pipe, model, adapt(model), Settings(**options), "test")
    run_recipe((Collect(), Assign(per_step=True), FitWeights(), FitRanges()), job)
    return job


def answers(job: Job, names: list[str]) -> dict[str, torch.Tensor]:
    """The layers' answers in whole forward passes, a row for each sample of each call."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        job.model.get_submodule(name).register_forward_hook(
            lambda module, args, answer, name=name: seen[name].append(answer)
        )
        for name in names
    ]
    for call in job.calls:
        run_call(job, call)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("precision", [Precision.FLOAT, Precision.FULL], ids=["float", "rounded"])
def test_features_are_the_answers_of_whole_forward_passes(precision, tmp_path):
    """Three steps of four images in two classes are six different rows, in the order of calls."""
    job = prepared(tiny_pipelines.dit(tmp_path), labels=(1, 2), guidance=1.0)
    for unit in job.adapter.temporal():
        features = JobFeatures(job, unit)
        set_precision(job.model, precision)
        ours = features()
        whole = answers(job, list(unit.features))
        inputs = features.features.inputs
        pairs = list(zip(*(inputs[name].tolist() for name in unit.reads), strict=True))
        assert len(pairs) == len(set(pairs)) >= 6
        rows = [
            pair
            for call in job.calls
            for pair in zip(*(read(call, name) for name in unit.reads), strict=True)
        ]
        places = [rows.index(pair) for pair in pairs]
        assert places == sorted(places) and set(rows) == set(pairs)
        for feature, name in zip(ours, unit.features, strict=True):
            theirs = whole[name][places]
            assert ((feature - theirs).norm() / theirs.norm()).item() < 1e-5


def read(call, name: str) -> list[float]:
    return call.arguments[name].tolist()


def test_errors_are_sums_of_squares_at_each_step():
    floating = tiny.model("unet2d")
    job = prepared(sampling.as_pipeline(tiny.model("unet2d")))
    set_precision(job.model, Precision.FULL)
    (unit,) = job.adapter.temporal()
    names = list(unit.features)
    ours = answers(job, names)
    set_precision(job.model, Precision.FLOAT)
    theirs = answers(job, names)
    set_precision(job.model, Precision.FULL)
    errors = temporal_errors(job.adapter, floating, job.model)
    known = [call.timestep for call in job.calls]
    assert errors.shape == (len(known), len(names))
    for column, name in enumerate(names):
        rows = (ours[name] - theirs[name]).double().square().sum(1)
        expected = rows.reshape(len(known), -1)[:, 0]
        assert errors[:, column].tolist() == pytest.approx(expected.tolist(), rel=1e-3)
