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
from lowtide.methods import METHODS, relevant_options, temporal_cache, tfmq
from lowtide.methods.temporal_cache import Maintain
from lowtide.models import adapt
from lowtide.nn.plan import Plan, RequestPlan
from lowtide.nn.precision import Precision
from lowtide.nn.request_features import PerRequest, StoredFeatures
from lowtide.nn.swap import find_clock, set_precision
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
    features = [name for name, request in ours.plan.requests.items() if not request.inner]
    assert summary["features"] == summary["by_request"] == len(features) > 2
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
    plans = {name: plan for name, plan in result.plan.requests.items() if not plan.inner}
    assert request.features.keys() == plans.keys()
    parts = set()
    for name, stored in request.features.items():
        assert isinstance(stored, StoredFeatures) and stored.codes.dtype == torch.uint8
        cache = plans[name].cache
        parts.add(cache.chunks)
        assert stored.codes.shape[2] == cache.width // cache.chunks
        assert stored.grid.scale.shape[:2] == stored.codes.shape[:2]
        assert len(stored.grid.scale.unique()) > 0.5 * stored.grid.scale.numel()
    assert parts != {1} or name == "sdxl"


def test_the_layers_before_a_feature_rest_while_it_is_stored(monkeypatch, tmp_path):
    result, _ = dit(with_maintain(), monkeypatch, tmp_path)
    inner = [layer for layer in layers(result.model) if layer.plan.inner]
    units = adapt(tiny.model("dit")).temporal()
    names = {name for unit in units for name in set(unit.layers) - set(unit.features)}
    assert {layer.name for layer in inner} == names
    runs: list[str] = []
    for layer in inner:
        layer.layer.register_forward_hook(lambda *_, name=layer.name: runs.append(name))
    with lowtide.unfused(result):
        drawn(result.pipe)
    assert sorted(runs) == sorted(names)  # once for all steps of the request


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


# Where g^_i is taken at some steps, a cache and a layer stand side by side.
MIXED = [
    ({"bits": 7}, {"weights": 8, "inputs": 8}),
    ({"bits": 3}, {"weights": 5, "inputs": 8}),
    ({"bits": 3, "block": 16}, {"weights": 5, "inputs": 8}),
    ({"bits": 7}, {"weights": 32, "inputs": 8}),
]


@pytest.mark.parametrize(("fields", "options"), [({}, {}), ({"block": 16}, {}), *MIXED])
def test_packed_answers_are_the_simulated_ones(fields, options, monkeypatch, tmp_path):
    recipe = with_maintain(**fields)
    assert isinstance(recipe[-1], Pack)
    result, _ = dit((*recipe[:-1], Simulate(), recipe[-1]), monkeypatch, tmp_path, **options)
    mixed = 0 < result.report["temporal"]["cached_share"] < 1
    assert mixed == ((fields, options) in MIXED)
    simulated = result.report["simulated"]
    times = result.plan.timesteps
    packed = answers(result.model, times)
    assert (packed - simulated).norm() / simulated.norm() < 1e-5
    result.save(tmp_path / "packed")
    loaded = lowtide.load(tmp_path / "packed")
    assert torch.equal(answers(loaded.transformer, times), packed)
    assert np.linalg.norm(drawn(loaded) - drawn(result.pipe)) == 0


@pytest.mark.parametrize(("fields", "options"), MIXED)
def test_selection_is_never_worse_than_either_alone(fields, options, monkeypatch, tmp_path):
    """Over the calibrated conditions, which are what it is judged on."""
    results = {}
    for name in ("selected", "cache", "block"):
        recipe = with_maintain(**fields, selection=name == "selected")
        if name == "block":
            recipe = tuple(each for each in recipe if not isinstance(each, Maintain))
        result, error = dit(recipe, monkeypatch, tmp_path, **options)
        original = tiny.model("dit")
        for label in (2, 1000):
            other = {"class_labels": torch.tensor(label)}
            error = error + temporal_errors(
                adapt(original), original, result.model, result.plan.times, other
            )
        results[name] = error
    assert results["selected"].sum() <= 1.0001 * results["cache"].sum()
    assert results["selected"].sum() <= 1.0001 * results["block"].sum()


@pytest.mark.parametrize(("fields", "options"), [({}, {}), *MIXED])
def test_bytes_are_those_of_the_checkpoint(fields, options, monkeypatch, tmp_path):
    recipe = with_maintain(**fields)
    ours, _ = dit(recipe, monkeypatch, tmp_path, **options)
    without = tuple(each for each in recipe if not isinstance(each, Maintain))
    theirs, _ = dit(without, monkeypatch, tmp_path, **options)
    summary = ours.report["temporal"]
    saved = summary["bytes_before"] - summary["bytes_after"]
    assert saved == theirs.report["account"]["total"] - ours.report["account"]["total"]


def test_a_block_that_is_better_everywhere_stays_as_it_is(monkeypatch, tmp_path):
    """Two-bit caches are worse than 8-bit layers at every step."""
    ours, error = dit(with_maintain(bits=2), monkeypatch, tmp_path, weights=8)
    theirs, tfmq_error = dit(tfmq.recipe(Settings()), monkeypatch, tmp_path, weights=8)
    assert ours.report["temporal"]["cached_share"] == 0
    assert set(ours.plan.requests.values()) == {RequestPlan(("class_labels", "timestep"))}
    assert ours.report["account"]["total"] == theirs.report["account"]["total"]
    assert error.sum() == pytest.approx(tfmq_error.sum().item(), rel=1e-4)


def test_a_new_schedule_takes_the_choice_of_the_nearest_step(monkeypatch, tmp_path):
    fields, options = MIXED[1]
    result, _ = dit(with_maintain(**fields), monkeypatch, tmp_path, **options)
    mixed = [layer for layer in layers(result.model) if layer.plan.cache and layer.exact]
    before = [layer.chosen.clone() for layer in mixed]
    assert mixed and any(0 < mark.sum() < 4 for mark in before)
    lowtide.reschedule(result, 8)
    known = torch.tensor(result.plan.timesteps)
    for layer, mark in zip(mixed, before, strict=True):
        assert len(layer.chosen) == len(known) == 8
        assert torch.equal(layer.chosen[1::2], mark) or torch.equal(layer.chosen[::2], mark)
    assert np.isfinite(sampling.images(result.pipe, sampling.Request(steps=8, **LABELS))).all()


def test_a_plan_of_version_two_is_read_as_it_was_written():
    """There, a layer that ran once a request was the list of what it read."""
    plan = Plan(requests={"adaln": RequestPlan(("class_labels", "timestep"))})
    assert '"requests":{"adaln":["class_labels","timestep"]}' in plan.to_json()
    assert Plan.from_json(plan.to_json()) == plan
    for version in (2, 3):
        file_format.check_version(version)
    for version in (1, 4):
        with pytest.raises(BadInput, match=f"found format version {version}"):
            file_format.check_version(version)


def test_distillation_reaches_the_layers_before_a_rounded_feature(monkeypatch, tmp_path):
    result, _ = dit(with_maintain(), monkeypatch, tmp_path)
    layer = layers(result.model)[0]
    layer.cache.building = True
    find_clock(result.model).set(torch.tensor([result.plan.timesteps[0]]))
    x = torch.randn(1, layer.layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
