"""Temporal Feature Matters on random models: the better of cache and block at every step."""

from dataclasses import dataclass, replace

import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import estimate, sampling
from lowtide.errors import BadInput
from lowtide.methods import METHODS, relevant_options, temporal_cache, tfmq
from lowtide.methods.temporal_cache import Maintain, maintained
from lowtide.models import adapt
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.report import text
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Stage, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import smooth_layer
from lowtide.stages.pack import Pack
from lowtide.stages.temporal_features import JobFeatures, temporal_errors

OPTIONS = {"steps": 8, "images": 2, "calibration_steps": 1, "iters": 20, "batch": 2}


def quantized(recipe, monkeypatch, model=None, **options):
    """A quantized pipeline, and the temporal features' error at each step and feature."""
    original = model or tiny.model("unet2d")
    pipe = sampling.as_pipeline(type(original).from_config(original.config))
    pipe.unet.load_state_dict(original.state_dict())
    monkeypatch.setitem(METHODS, "this", lambda settings: recipe)
    relevant = relevant_options("this", OPTIONS | options)
    result = lowtide.quantize(pipe, method="this", **relevant)
    return result, temporal_errors(adapt(original), original, pipe.unet)


def changed(recipe, stage, **fields):
    return tuple(replace(each, **fields) if isinstance(each, stage) else each for each in recipe)


def test_selection_is_never_worse_than_cache_or_block_alone(monkeypatch):
    # Coarse caches and good layers: each wins somewhere.
    options = {"weights": 8, "inputs": 6, "only_schedule": True}
    recipe = changed(temporal_cache.recipe(Settings()), Maintain, bits=6)
    selected, error = quantized(recipe, monkeypatch, **options)
    _, cache = quantized(changed(recipe, Maintain, selection=False), monkeypatch, **options)
    _, block = quantized(
        tuple(each for each in recipe if not isinstance(each, Maintain)), monkeypatch, **options
    )
    assert (error <= torch.minimum(cache, block) * 1.0001).all()
    assert 0.05 < selected.report["temporal"]["cached_share"] < 0.95
    assert error.sum() < 0.95 * min(cache.sum(), block.sum())


def test_selection_judges_smoothed_layers_as_they_will_run(monkeypatch):
    """A smoothed layer divides what reaches it before it is rounded."""
    judged: list[torch.Tensor] = []
    real: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Smooth(Stage):
        def run(self, job: Job) -> None:
            for unit in job.adapter.temporal():
                for name in unit.layers:
                    width = job.model.get_submodule(name).weight.shape[1]
                    smooth_layer(job, name, torch.linspace(0.3, 6.0, width))

    @dataclass(frozen=True)
    class Look(Stage):
        def run(self, job: Job) -> None:
            for unit in job.adapter.temporal():
                features = JobFeatures(job, unit)
                features.floating()
                judged.extend(maintained(job, unit, features))
                run_recipe((FitRanges("minmax"),), job)
                features.set_precision(Precision.FULL)
                with torch.no_grad():
                    real.extend(features())

    start = (
        Collect(),
        Assign(per_step=True),
        Smooth(),
        FitWeights("mse"),
        Look(),
        FitRanges("minmax"),
        Pack(),
    )
    quantized(start, monkeypatch, weights=4, inputs=4)
    assert len(judged) > 3
    assert all(
        torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(judged, real, strict=True)
    )


@pytest.mark.parametrize("inputs", [8, 4])
def test_the_cache_beats_tfmq_at_four_bits(inputs, monkeypatch):
    """Caches keep 8 bits at 4-bit inputs, so they lower the error by a larger factor there."""
    result, ours = quantized(temporal_cache.recipe(Settings()), monkeypatch, inputs=inputs)
    _, theirs = quantized(tfmq.recipe(Settings()), monkeypatch, inputs=inputs)
    assert ours.sum() < theirs.sum() / (5 if inputs == 8 else 100)
    assert {cache.format.bits for cache in result.plan.cached.values()} == {8}


def test_a_block_cached_at_every_step_leaves_the_checkpoint(monkeypatch, tmp_path):
    recipe = changed(temporal_cache.recipe(Settings()), Maintain, selection=False)
    result, error = quantized(recipe, monkeypatch, only_schedule=True)
    names = set(result.model.state_dict())
    assert not any(
        name.startswith("time_embedding") or ".time_emb_proj.layer" in name for name in names
    )
    assert isinstance(result.model.time_embedding.linear_1, ZeroFeatures)
    assert isinstance(result.model.mid_block.resnets[0].time_emb_proj, Cached)
    summary = result.report["temporal"]
    assert summary["cached_share"] == 1.0
    assert summary["bytes_after"] < summary["bytes_before"]
    assert error.mean() < 1e-3
    request = sampling.Request(steps=8, seeds=(0, 1))
    before = sampling.images(result.pipe, request)
    result.save(tmp_path / "cached")
    assert (sampling.images(lowtide.load(tmp_path / "cached"), request) == before).all()


def test_scale_and_shift_have_grids_of_their_own(monkeypatch):
    torch.manual_seed(0)
    model = tiny.unet2d(resnet_time_scale_shift="scale_shift").eval()
    recipe = changed(temporal_cache.recipe(Settings()), Maintain, selection=False)
    result, _ = quantized(recipe, monkeypatch, model)
    cached = result.model.mid_block.resnets[0].time_emb_proj
    assert cached.plan.chunks == 2
    assert len(cached.scale) == 2 * 8


def test_an_unknown_timestep_is_an_error_even_with_one_range_for_all(monkeypatch):
    recipe = temporal_cache.recipe(Settings())
    result, _ = quantized(recipe, monkeypatch, inputs=32, only_schedule=True)
    with pytest.raises(BadInput, match="found timestep 1; expected one of the 8"):
        result.model(torch.zeros(1, 3, 8, 8), 1)


def test_sixteen_bits_change_nothing(monkeypatch):
    original = tiny.model("unet2d")
    result, _ = quantized(temporal_cache.recipe(Settings()), monkeypatch, weights=32, inputs=32)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(result.model(x, 875)[0], original(x, 875)[0])
    assert result.plan.left["cache of temporal:time_embedding.linear_1"] == "nothing is quantized"


def test_a_block_above_eight_bits_stays_in_float(monkeypatch, tmp_path):
    recipe = changed(temporal_cache.recipe(Settings()), Maintain, block=16)
    result, error = quantized(recipe, monkeypatch)
    original = tiny.model("unet2d")
    kept = result.model.mid_block.resnets[0].time_emb_proj.layer
    assert torch.equal(kept.weight, original.mid_block.resnets[0].time_emb_proj.weight)
    assert torch.equal(
        result.model.time_embedding.linear_1.weight, original.time_embedding.linear_1.weight
    )
    assert error.mean() < 1e-3
    result.save(tmp_path / "kept")
    request = sampling.Request(steps=8, seeds=(0,))
    assert (
        sampling.images(lowtide.load(tmp_path / "kept"), request)
        == sampling.images(result.pipe, request)
    ).all()


@pytest.mark.parametrize("name", ["dit", "sdxl"])
def test_nothing_can_be_left_out_where_no_cache_can_be(name, tmp_path):
    """The command line predicts first, so it refuses before anything runs."""
    adapter = adapt(tiny.model("unet-sdxl" if name == "sdxl" else name))
    only = Settings(only_schedule=True)
    with pytest.raises(BadInput, match="found only_schedule with a model that has no block"):
        Maintain().check_model(adapter, only)
    Maintain().check_model(adapter, Settings())
    Maintain().check_model(adapt(tiny.model("unet2d")), only)
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    with pytest.raises(BadInput, match="found only_schedule"):
        estimate.plan(str(tmp_path / "model"), method="temporal_cache", steps=3, only_schedule=True)


@dataclass(frozen=True)
class Simulate(Stage):
    """The answers of the model before it is packed, at every step."""

    def run(self, job: Job) -> None:
        set_precision(job.model, Precision.FULL)
        job.report["simulated"] = answers(job.model, job.plan.timesteps)


@torch.no_grad()
def answers(model, timesteps) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with lowtide.unfused(model):
        return torch.stack([model(x, timestep)[0] for timestep in timesteps])


@pytest.mark.parametrize(
    ("method", "fields", "options"),
    [
        ("temporal_cache", {"bits": 6}, {"weights": 8, "inputs": 6, "only_schedule": True}),
        ("temporal_cache", {"selection": False}, {"only_schedule": True}),
        ("temporal_cache", {}, {}),
        ("best", {}, {"only_schedule": True}),
        ("best", {}, {}),
    ],
)
def test_a_block_whose_first_layer_stays_in_float_is_cached(
    method, fields, options, monkeypatch, tmp_path
):
    recipe = changed(METHODS[method](Settings()), Maintain, **fields)
    assert isinstance(recipe[-1], Pack)
    recipe = (*recipe[:-1], Simulate(), recipe[-1])
    result, error = quantized(recipe, monkeypatch, profile="tfmq", **options)
    summary = result.report["temporal"]
    first = result.model.time_embedding.linear_1
    assert set(result.plan.cached) == set(adapt(tiny.model("unet2d")).temporal()[0].features)
    assert error.mean() < 2e-3
    if any(cache.computed for cache in result.plan.cached.values()):
        assert 0 < summary["cached_share"] < 1
        assert (
            type(first) is torch.nn.Linear
            and "first temporal layer" in result.plan.left["time_embedding.linear_1"]
        )
    else:
        assert summary["cached_share"] == 1
        left = result.plan.left.get("time_embedding.linear_1")
        if "only_schedule" in options:
            assert isinstance(first, ZeroFeatures) and left is None
            assert "input of time_embedding.linear_2" not in result.plan.left
        else:
            assert type(first) is torch.nn.Linear and "first temporal layer" in left
            kept = "kept for other schedules, on inputs in float"
            assert result.plan.left["input of mid_block.resnets.0.time_emb_proj"] == kept
    assert torch.equal(answers(result.model, result.plan.timesteps), result.report["simulated"])
    result.save(tmp_path / "paper")
    loaded = lowtide.load(tmp_path / "paper").unet
    assert torch.equal(answers(loaded, result.plan.timesteps), result.report["simulated"])


@pytest.mark.parametrize(
    ("fields", "options", "sign"),
    [
        ({"selection": False}, {"weights": 4, "inputs": 8, "only_schedule": True}, 1),
        ({"bits": 6}, {"weights": 8, "inputs": 6, "only_schedule": True}, -1),
        (
            {"bits": 6},
            {"weights": 8, "inputs": 6, "profile": "tfmq", "only_schedule": True},
            -1,
        ),
        ({"bits": 32}, {"weights": 4, "inputs": 16, "only_schedule": True}, 1),
        ({}, {"weights": 4, "inputs": 8}, -1),
        ({"block": 16}, {"weights": 4, "inputs": 8}, -1),
    ],
)
def test_bytes_are_those_of_the_checkpoints_tensors(fields, options, sign, monkeypatch):
    """Bytes before and after differ as checkpoints without and with caches do, to the byte."""
    recipe = changed(temporal_cache.recipe(Settings()), Maintain, **fields)
    options = options | {"iters": 2}
    ours, _ = quantized(recipe, monkeypatch, **options)
    theirs, _ = quantized(
        tuple(each for each in recipe if not isinstance(each, Maintain)), monkeypatch, **options
    )
    summary = ours.report["temporal"]
    assert (summary["cached_share"] == 1) == (fields.get("bits") != 6)
    saved = summary["bytes_before"] - summary["bytes_after"]
    assert saved == theirs.report["account"]["total"] - ours.report["account"]["total"]
    assert saved * sign > 0
    (line,) = text.temporal(summary)
    assert f"{summary['bytes_before']:,} -> {summary['bytes_after']:,} bytes" in line
    assert f"cached: {100 * summary['cached_share']:.0f} %" in line
