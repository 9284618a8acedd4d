"""TIAR in parts: of a large block, the shared layers learn first, then the layers behind them."""

from functools import cache

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.models import adapt
from lowtide.stages.reconstruct import Learner
from lowtide.stages.temporal_features import temporal_errors
from lowtide.stages.tiar import AT_ONCE, parts_of

OPTIONS = {"method": "tfmq", "steps": 4, "images": 1, "calibration_steps": 1, "batch": 1}


def temporal_block():
    adapter = adapt(tiny.model("unet2d"))
    (unit,) = adapter.temporal()
    return adapter, unit


def quantized(at_once, without=("reconstruct",), folder=None):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    stages = {} if "tiar" in without else {"tiar": {"at_once": at_once}}
    options = OPTIONS | {"iters": 16, "folder": folder}
    return lowtide.quantize(pipe, without=without, stages=stages, **options)


once = cache(quantized)


def error(result):
    floating = tiny.model("unet2d")
    return temporal_errors(adapt(floating), floating, result.model).sum().item()


def test_a_block_of_the_usual_size_learns_whole():
    adapter, unit = temporal_block()
    assert parts_of(adapter, unit, AT_ONCE) == [unit]


@pytest.mark.parametrize("at_once", [1, 3000, 5000])
def test_h_comes_first_and_each_layer_once(at_once):
    adapter, unit = temporal_block()
    first, *groups = parts_of(adapter, unit, at_once)
    assert first.layers == ("time_embedding.linear_1", "time_embedding.linear_2")
    assert first.features == unit.features
    assert [name for part in groups for name in part.layers] == list(unit.layers[2:])
    for part in groups:
        assert part.features == part.layers
        weights = [adapter.all_layers[name].weight.numel() for name in part.layers]
        assert len(weights) == 1 or sum(weights) <= at_once
    assert len(groups) == {1: 8, 3000: 7, 5000: 4}[at_once]


def test_groups_of_any_size_give_the_same_codes():
    """Once h is known, the loss of a g_i depends on no other."""
    one = once(1).model.state_dict()
    more = once(5000).model.state_dict()
    assert all(torch.equal(one[name], more[name]) for name in one)


def test_parts_keep_the_features_as_the_whole_does():
    _, unit = temporal_block()
    nearest = error(once(AT_ONCE, without=("reconstruct", "tiar")))
    parts = once(1)
    assert error(parts) < nearest / 3
    assert error(parts) < 1.1 * error(once(AT_ONCE))
    learnt = [name for name in parts.report["losses"] if name.startswith("TIAR")]
    assert len(learnt) == 1 + len(unit.layers[2:])


def test_a_killed_run_goes_on_with_the_parts_that_it_has(tmp_path, monkeypatch):
    search = Learner.search
    seen: list[str] = []

    def listening(self, loss):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(self.unit.name)
        return search(self, loss)

    monkeypatch.setattr(Learner, "search", listening)
    with pytest.raises(KeyboardInterrupt):
        quantized(1, folder=tmp_path)
    before = list(seen)
    seen.clear()
    monkeypatch.setattr(Learner, "search", lambda self, loss: seen.append(0) or search(self, loss))
    resumed = quantized(1, folder=tmp_path).model.state_dict()
    assert len(before) + len(seen) == 9
    monkeypatch.setattr(Learner, "search", search)
    whole = once(1).model.state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
