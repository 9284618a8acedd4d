"""Drift by layer: against hooks set by hand, silent for a model against itself, whatever the plan has rewritten."""

import pytest
import tiny
import tiny_pipelines
import torch
from packed_pair import QUICK, pair

import lowtide
from lowtide import sampling
from lowtide.evaluation import compared_models, layer_drift
from lowtide.models import adapt
from lowtide.stages.temporal_features import temporal_errors

REQUEST = sampling.Request(steps=3, seeds=(0, 1, 2, 3, 4))


def measured(original, other):
    adapter = layer_drift.reference_adapter(original)
    calls = layer_drift.reference_calls(original, REQUEST, 3)
    return calls, layer_drift.layer_errors(
        adapter, original.model, other.model, calls, skip=other.plan.blank
    )


def test_layer_errors_are_those_of_the_layers():
    original, packed = map(compared_models.load, pair())
    calls, found = measured(original, packed)
    assert [len(call.t) for call in calls] == [4, 4, 4]
    assert found["names"] == list(adapt(original.model).layers())
    assert (
        found["timesteps"]
        == [int(call.t[0]) for call in calls]
        == sorted(found["timesteps"], reverse=True)
    )
    heard = {}
    for model in (original.model, packed.model):
        hook = model.conv_in.register_forward_hook(
            lambda module, args, out, model=model: heard.update({id(model): out})
        )
        ends = model(**calls[1].arguments)[0]
        heard[id(model), "end"] = ends
        hook.remove()
    for key in ((), ("end",)):
        theirs, ours = (
            heard[(id(model), *key) if key else id(model)]
            for model in (original.model, packed.model)
        )
        name = "conv_out" if key else "conv_in"
        by_hand = float((ours - theirs).norm() / theirs.norm())
        assert found["error"][found["names"].index(name)][1] == pytest.approx(by_hand, rel=1e-5)
        assert 0 < by_hand < 1


def test_a_model_is_no_distance_from_itself():
    original, again = (compared_models.load(pair()[0]) for _ in range(2))
    _, found = measured(original, again)
    assert max(max(row) for row in found["error"]) == 0
    assert not original.model.conv_in._forward_hooks


@pytest.mark.parametrize("method", ["temporal_cache", "tcaq"])
def test_rewritten_models_are_heard_where_they_still_answer(method, monkeypatch):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    original = compared_models.load(sampling.as_pipeline(tiny.model("unet2d")))
    packed = compared_models.load(lowtide.quantize(pipe, method=method, **QUICK))
    _, found = measured(original, packed)
    missing = set(adapt(original.model).layers()) - set(found["names"])
    assert missing <= {*packed.plan.blank, "time_embedding.linear_1", "time_embedding.linear_2"}
    assert max(max(row) for row in found["error"]) < 1
    told = layer_drift.temporal_drift(adapt(original.model), original, packed)
    errors = temporal_errors(adapt(original.model), original.model, packed.model)
    assert torch.equal(torch.tensor(told["error"], dtype=errors.dtype), errors.T)
    assert told["timesteps"] == [666, 333, 0] and len(told["features"]) == errors.shape[1]


def test_no_temporal_drift_where_the_block_reads_more_than_time(tmp_path):
    pipe, asked = tiny_pipelines.dit(tmp_path), tiny_pipelines.asked("dit")
    original = compared_models.load(tiny_pipelines.dit(tmp_path))
    packed = compared_models.load(lowtide.quantize(pipe, method="minmax", **QUICK | asked))
    assert layer_drift.temporal_drift(adapt(original.model), original, packed) is None


def test_sums_of_a_silent_layer():
    sums, silent = layer_drift.Sums(), torch.zeros(2)
    sums.add("a", silent, silent)
    sums.add("b", torch.ones(2), silent)
    sums.add("c", torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert [sums.relative(name) for name in "abc"] == [0, 1, 1.25]
