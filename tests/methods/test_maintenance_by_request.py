"""Temporal Feature Matters where features depend on a label or a text: one float run a request."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.checkpoint import file_format
from lowtide.errors import BadInput
from lowtide.formats import Affine
from lowtide.methods import METHODS, relevant_options, temporal_cache, tfmq
from lowtide.methods.temporal_cache import Maintain
from lowtide.models import adapt
from lowtide.nn.extension import Neighbours
from lowtide.nn.plan import CachePlan, Plan, RequestPlan
from lowtide.nn.precision import Precision
from lowtide.nn.request_features import PerRequest, StoredFeatures, round_features
from lowtide.nn.swap import set_precision
from lowtide.report import text
from lowtide.settings import Settings
from lowtide.stages.base import Job, Stage
from lowtide.stages.pack import Pack
from lowtide.stages.temporal_features import temporal_errors

OPTIONS = {"steps": 4, "images": 2, "calibration_steps": 2, "iters": 4, "batch": 2}
LABELS = {"labels": (1, 2)}
LABEL = {"class_labels": torch.tensor(1)}


def dit(recipe, monkeypatch, folder, **options):
    """A quantized DiT, and the error of its temporal features at each step, for label 1."""
    monkeypatch.setitem(METHODS, "this", lambda settings: recipe)
    relevant = relevant_options("this", OPTIONS | LABELS | options)
    result = lowtide.quantize(tiny_pipelines.dit(folder), method="this", **relevant)
    original = tiny.model("dit")
    return result, temporal_errors(
        adapt(original), original, result.model, result.plan.times, LABEL
    )


def with_maintain(**fields):
    recipe = temporal_cache.recipe(Settings())
    return tuple(replace(each, **fields) if isinstance(each, Maintain) else each for each in recipe)


def layers(model) -> list[PerRequest]:
    return [module for module in model.modules() if isinstance(module, PerRequest)]


def drawn(pipe) -> np.ndarray:
    return sampling.images(pipe, sampling.Request(steps=4, seeds=(0, 1), **LABELS))


def test_the_float_block_takes_the_place_of_the_quantized_one(monkeypatch, tmp_path):
    ours, error = dit(with_maintain(), monkeypatch, tmp_path)
    theirs, tfmq_error = dit(tfmq.recipe(Settings()), monkeypatch, tmp_path)
    assert error.sum() < tfmq_error.sum() / 20
    assert (drawn(ours.pipe) != drawn(theirs.pipe)).any()
    summary = ours.report["temporal"]
    assert summary["cached_share"] == 1
    assert summary["features"] == summary["by_request"] == len(ours.plan.requests) > 2
    lines = text.temporal(summary)
    assert "100 % of (t, block) pairs" in lines[0]
    assert lines[1] == f"of these, {summary['by_request']} features once a request"
    kept = {name: ours.plan.layers[name] for name in ours.plan.requests}
    assert all(plan.weight.bits == 8 and plan.input is None for plan in kept.values())


@pytest.mark.parametrize("name", ["dit", "sdxl", "sd3", "flux"])
def test_features_are_codes_on_a_grid_for_each_step_sample_and_part(name, tmp_path):
    conditions = tiny_pipelines.request_fields(name)
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    result = lowtide.quantize(pipe, method="temporal_cache", **OPTIONS | conditions)
    sampling.images(result.pipe, sampling.Request(steps=4, seeds=(0, 1), **conditions))
    request = layers(result.model)[0].cache.requests[-1]
    plans = result.plan.requests
    assert request.features.keys() == plans.keys()
    parts = set()
    for layer, stored in request.features.items():
        assert isinstance(stored, StoredFeatures) and stored.codes.dtype == torch.uint8
        cache = plans[layer].cache
        parts.add(cache.chunks)
        assert stored.codes.shape[2] == cache.width // cache.chunks
        assert stored.grid.scale.shape[:2] == stored.codes.shape[:2]
        assert len(stored.grid.scale.unique()) > 0.5 * stored.grid.scale.numel()
    assert parts != {1} or name == "sdxl"


def test_what_is_computed_for_one_call_is_what_the_cache_holds(monkeypatch, tmp_path):
    result, _ = dit(with_maintain(), monkeypatch, tmp_path)
    with lowtide.unfused(result):
        cached = drawn(result.pipe)
        cache = layers(result.model)[0].cache
        cache.building = True
        computed = drawn(result.pipe)
    assert np.linalg.norm(computed - cached) / np.linalg.norm(cached) < 2e-3


@dataclass(frozen=True)
class Simulate(Stage):
    """The answers of the model before it is packed, at every step."""

    def run(self, job: Job) -> None:
        set_precision(job.model, Precision.FULL)
        job.report["simulated"] = answers(job.model, job.plan.timesteps)


@torch.no_grad()
def answers(model, timesteps) -> torch.Tensor:
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([1])
    with lowtide.unfused(model):
        results = [
            model(x, timestep=torch.tensor([time]), class_labels=label)[0] for time in timesteps
        ]
    return torch.stack(results)


# What the quantized layers have where they stand beside a float block.
MIXED = [
    ({}, {"weights": 8}),
    ({}, {"weights": 5}),
    ({"block": 16}, {"weights": 5}),
    ({}, {"weights": 32}),
]


@pytest.fixture
def every_other_step(monkeypatch):
    """A cache at every other step, which is rare on a tiny model: a layer stands beside it."""
    selected = temporal_cache.selected

    def alternating(*features):
        marks = torch.zeros_like(selected(*features))
        marks[::2] = True
        return marks

    monkeypatch.setattr(temporal_cache, "selected", alternating)


def packed_as_simulated(fields, options, monkeypatch, folder):
    recipe = with_maintain(**fields)
    assert isinstance(recipe[-1], Pack)
    result, _ = dit((*recipe[:-1], Simulate(), recipe[-1]), monkeypatch, folder, **options)
    simulated = result.report["simulated"]
    times = result.plan.timesteps
    packed = answers(result.model, times)
    assert (packed - simulated).norm() / simulated.norm() < 1e-5
    result.save(folder / "packed")
    loaded = lowtide.load(folder / "packed")
    assert torch.equal(answers(loaded.transformer, times), packed)
    assert np.linalg.norm(drawn(loaded) - drawn(result.pipe)) == 0
    return result.report["temporal"]["cached_share"]


@pytest.mark.parametrize("fields", [{}, {"block": 16}, {"bits": 32}])
def test_packed_answers_are_the_simulated_ones(fields, monkeypatch, tmp_path):
    assert packed_as_simulated(fields, {}, monkeypatch, tmp_path) == 1


@pytest.mark.usefixtures("every_other_step")
@pytest.mark.parametrize(("fields", "options"), MIXED)
def test_so_are_those_of_a_layer_beside_a_cache(fields, options, monkeypatch, tmp_path):
    assert packed_as_simulated(fields, options, monkeypatch, tmp_path) == 0.5


@pytest.mark.parametrize(("bits", "weights", "share"), [(2, 8, 0), (8, 4, 1), (6, 5, 1)])
def test_selection_is_never_worse_than_either_alone(bits, weights, share, monkeypatch, tmp_path):
    """Over the calibrated conditions, which are what it is judged on."""
    original = tiny.model("dit")
    errors = {}
    for name in ("selected", "cache", "block"):
        recipe = with_maintain(bits=bits, selection=name == "selected")
        if name == "block":
            recipe = tuple(each for each in recipe if not isinstance(each, Maintain))
        result, errors[name] = dit(recipe, monkeypatch, tmp_path, weights=weights)
        for label in (2, 1000):
            other = {"class_labels": torch.tensor(label)}
            errors[name] += temporal_errors(
                adapt(original), original, result.model, result.plan.times, other
            )
        if name == "selected":
            assert result.report["temporal"]["cached_share"] == share
    assert errors["selected"].sum() <= 1.0001 * errors["cache"].sum()
    assert errors["selected"].sum() <= 1.0001 * errors["block"].sum()


def assert_bytes_are_those_of_the_checkpoint(fields, options, monkeypatch, folder):
    recipe = with_maintain(**fields)
    ours, _ = dit(recipe, monkeypatch, folder, **options)
    without = tuple(each for each in recipe if not isinstance(each, Maintain))
    theirs, _ = dit(without, monkeypatch, folder, **options)
    summary = ours.report["temporal"]
    saved = summary["bytes_before"] - summary["bytes_after"]
    assert saved == theirs.report["account"]["total"] - ours.report["account"]["total"]


@pytest.mark.parametrize("fields", [{}, {"block": 16}])
def test_bytes_are_those_of_the_checkpoint(fields, monkeypatch, tmp_path):
    assert_bytes_are_those_of_the_checkpoint(fields, {}, monkeypatch, tmp_path)


@pytest.mark.usefixtures("every_other_step")
@pytest.mark.parametrize(("fields", "options"), MIXED)
def test_so_are_those_of_a_layer_and_a_cache(fields, options, monkeypatch, tmp_path):
    assert_bytes_are_those_of_the_checkpoint(fields, options, monkeypatch, tmp_path)


def test_a_block_that_is_better_everywhere_stays_as_it_is(monkeypatch, tmp_path):
    """Two-bit caches are worse than 8-bit layers at every step."""
    ours, error = dit(with_maintain(bits=2), monkeypatch, tmp_path, weights=8)
    theirs, tfmq_error = dit(tfmq.recipe(Settings()), monkeypatch, tmp_path, weights=8)
    assert ours.report["temporal"]["cached_share"] == 0
    assert set(ours.plan.requests.values()) == {RequestPlan(("class_labels", "timestep"))}
    assert ours.report["account"]["total"] == theirs.report["account"]["total"]
    assert error.sum() == pytest.approx(tfmq_error.sum().item(), rel=1e-4)


@pytest.mark.usefixtures("every_other_step")
def test_a_new_schedule_takes_the_choice_of_the_nearest_step(monkeypatch, tmp_path):
    fields, options = MIXED[1]
    result, _ = dit(with_maintain(**fields), monkeypatch, tmp_path, **options)
    mixed = [layer for layer in layers(result.model) if layer.plan.cache and layer.exact]
    before = [layer.chosen.clone() for layer in mixed]
    assert len(mixed) > 2 and all(mark.sum() == 2 for mark in before)
    changed = lowtide.reschedule(result, 8)
    old = Neighbours.of(list(result.plan.times), list(changed.plan.times)).nearest
    for layer, mark in zip(mixed, before, strict=True):
        assert len(old) == 8 and torch.equal(layer.chosen, mark[old])
    assert np.isfinite(sampling.images(result.pipe, sampling.Request(steps=8, **LABELS))).all()


def test_a_plan_of_version_two_is_read_as_it_was_written():
    """There, a layer that ran once a request was the list of what it read."""
    plan = Plan(requests={"adaln": RequestPlan(("class_labels", "timestep"))})
    assert '"requests":{"adaln":["class_labels","timestep"]}' in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    for version in (2, 3, 4, 5, 6):
        file_format.check_version(version)
    for version in (1, 7):
        with pytest.raises(BadInput, match=f"found format_version {version}"):
            file_format.check_version(version)


def test_a_gradient_passes_through_a_rounded_feature():
    """So distillation reaches the layers before it."""
    features = torch.randn(3, 12, requires_grad=True)
    rounded = round_features(features, CachePlan(12, Affine(4, axis=0), chunks=3))
    assert 0 < (rounded - features).norm() / features.norm() < 0.1
    (2 * rounded).sum().backward()
    assert torch.equal(features.grad, torch.full((3, 12), 2.0))
