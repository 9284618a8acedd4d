"""TFMQ-DM on a random model: TIAR keeps the features; each stage left out is the ablation."""

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, minmax, relevant_options, tfmq
from lowtide.models import adapt
from lowtide.nn.swap import find_clock, quantizers
from lowtide.settings import Settings
from lowtide.stages.reconstruct import Learner
from lowtide.stages.temporal_features import temporal_errors

OPTIONS = {"steps": 8, "images": 2, "calibration_steps": 1, "iters": 60, "batch": 2}


def error(recipe, monkeypatch, name="unet2d") -> float:
    """The temporal features' error of a model quantized by a recipe."""
    original = tiny.model(name)
    pipe = sampling.as_pipeline(tiny.model(name))
    monkeypatch.setitem(METHODS, "this", lambda settings: recipe)
    lowtide.quantize(pipe, method="this", **relevant_options("this", OPTIONS))
    return temporal_errors(adapt(original), original, pipe.unet).sum().item()


def without(recipe, stage):
    return tuple(each for each in recipe if not isinstance(each, stage))


def test_tiar_cuts_the_error_of_the_temporal_features_threefold(monkeypatch):
    recipe = tfmq.recipe(Settings())
    with_tiar = error(recipe, monkeypatch)
    assert with_tiar < error(without(recipe, tfmq.TIAR), monkeypatch) / 3
    assert with_tiar < error(minmax.recipe(Settings()), monkeypatch) / 3


def test_ranges_per_step_cut_it_further(monkeypatch):
    recipe = tfmq.recipe(Settings())
    assert error(recipe, monkeypatch) < error(without(recipe, tfmq.FSC), monkeypatch)


def test_without_fsc_there_is_one_range_for_all_steps():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = lowtide.quantize(pipe, method="tfmq", without=("fsc",), **OPTIONS)
    assert find_clock(result.model).scale.shape[1] == 1


def test_fsc_of_the_paper_is_of_the_temporal_block_alone(tmp_path):
    pipe = tiny_pipelines.ddim(tmp_path)
    stages = {"fsc": {"scope": "temporal"}}
    result = lowtide.quantize(pipe, method="tfmq", stages=stages, **OPTIONS)
    (unit,) = adapt(tiny.model("unet2d")).temporal()
    stepped = {name for name, plan in result.plan.layers.items() if plan.per_step}
    assert stepped == set(unit.layers) & result.plan.layers.keys()
    parts = [part for parts in result.plan.attentions.values() for part in parts.values()]
    assert parts and not any(part.per_step for part in parts)
    clock = find_clock(result.model)
    for name, quantizer in quantizers(result.model).items():
        row = clock.scale[quantizer.row]
        assert quantizer.per_step == (name.removesuffix(".input") in stepped)
        assert quantizer.per_step or len(row.unique()) == 1
    # The layers behind a SiLU of h(t); the sinusoids before them have one range at every t.
    assert sum(len(clock.scale[each.row].unique()) > 1 for each in steps_of(result.model)) > 2
    request = sampling.Request(steps=OPTIONS["steps"], seeds=(0, 1))
    drawn = sampling.images(result.pipe, request)
    with lowtide.unfused(result):
        plain = sampling.images(result.pipe, request)
    # As far apart as with a range for every input: a rounding may turn out the other way.
    assert np.linalg.norm(drawn - plain) / np.linalg.norm(plain) < 0.05
    loaded = lowtide.load(result.save(tmp_path / "packed"))
    assert (sampling.images(loaded, request) == drawn).all()


def steps_of(model):
    return [each for each in quantizers(model).values() if each.per_step]


def test_errors_are_zero_where_nothing_is_quantized():
    original = tiny.model("unet2d")
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    lowtide.quantize(pipe, method="tfmq", weights=32, inputs=32, **OPTIONS)
    assert temporal_errors(adapt(original), original, pipe.unet).abs().max() == 0


def test_ranges_follow_the_timestep():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = lowtide.quantize(pipe, method="tfmq", **OPTIONS)
    clock = find_clock(result.model)
    assert clock.scale.shape[1] == 8
    assert clock.timesteps.tolist() == [875, 750, 625, 500, 375, 250, 125, 0]
    assert (clock.scale.std(1) / clock.scale.mean(1)).mean() > 0.01


def test_minmax_has_one_range():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = lowtide.quantize(pipe, method="minmax", steps=8, images=2)
    assert find_clock(result.model).scale.shape[1] == 1


def test_reconstruction_never_does_worse_than_nearest():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    report = lowtide.quantize(
        pipe, method="tfmq", **OPTIONS | {"iters": 200, "images": 4, "calibration_steps": 4}
    ).report
    gains = [after / before for before, after in report["losses"].values()]
    assert sum(gain < 1 for gain in gains) >= 0.8 * len(gains)
    assert torch.tensor(gains).median() < 0.8


@pytest.mark.parametrize("name", ["minmax", "tfmq"])
def test_random_numbers_depend_on_seed_stage_and_unit(name):
    pipes = [sampling.as_pipeline(tiny.model("unet2d")) for _ in range(3)]
    for pipe, seed in zip(pipes, (0, 0, 1), strict=True):
        torch.manual_seed(len(pipes) + seed)  # the global state must not matter
        torch.rand(seed + 1)
        options = relevant_options(name, OPTIONS | {"seed": seed})
        lowtide.quantize(pipe, method=name, **options)
    first, same, other = (pipe.unet.state_dict() for pipe in pipes)
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize(("left_out", "blocks"), [((), False), (("tiar",), True)])
def test_temporal_layers_are_rounded_for_themselves_or_else_with_their_blocks(
    monkeypatch, left_out, blocks
):
    rounded: dict[str, set[str]] = {}
    search = Learner.search

    def listening(self, loss):
        rounded.setdefault(self.stage, set()).update(self.layers)
        return search(self, loss)

    monkeypatch.setattr(Learner, "search", listening)
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    (unit,) = adapt(pipe.unet).temporal()
    lowtide.quantize(pipe, method="tfmq", without=left_out, **OPTIONS | {"iters": 1})
    assert ("TIAR" in rounded) is not blocks
    assert (set(unit.features) <= rounded["Reconstruct"]) is blocks
