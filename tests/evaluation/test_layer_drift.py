"""Layer drift: equal to a computation by hand, zero for equal models, for all rewritten models."""

import pytest
import tiny
import tiny_pipelines
import torch
from packed_pair import QUICK, pair

import lowtide
from lowtide import sampling
from lowtide.evaluation import compared_models, layer_drift
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.stages.temporal_features import temporal_errors

REQUEST = sampling.Request(steps=3, seeds=(0, 1, 2, 3, 4))


def measured(original, other):
    adapter = layer_drift.reference_adapter(original, REQUEST)
    calls = layer_drift.reference_calls(original, REQUEST, 3)
    errors = layer_drift.layer_errors(
        adapter, original.denoiser, other.denoiser, calls, skip=other.plan.blank
    )
    return calls, errors


def largest(errors):
    return max(max(row) for row in errors.error)


def first_and_last(model, call):
    """The outputs of conv_in and of conv_out, which is the model's own output."""
    outputs = {}
    hook = model.conv_in.register_forward_hook(
        lambda module, args, out: outputs.update(conv_in=out)
    )
    outputs["conv_out"] = model(**call.arguments)[0]
    hook.remove()
    return outputs


def test_layer_errors_are_those_of_the_layers():
    original, packed = map(compared_models.load, pair())
    calls, errors = measured(original, packed)
    assert [len(call.t) for call in calls] == [4, 4, 4]
    assert errors.names == list(adapt(original.denoiser).layers())
    assert errors.timesteps == [int(call.t[0]) for call in calls]
    assert errors.timesteps == sorted(errors.timesteps, reverse=True)
    theirs = first_and_last(original.denoiser, calls[1])
    ours = first_and_last(packed.denoiser, calls[1])
    for name in ("conv_in", "conv_out"):
        by_hand = float((ours[name] - theirs[name]).norm() / theirs[name].norm())
        assert errors.error[errors.names.index(name)][1] == pytest.approx(by_hand, rel=1e-5)
        assert 0 < by_hand < 1


def test_a_model_has_no_distance_from_itself():
    original, again = (compared_models.load(pair()[0]) for _ in range(2))
    _, errors = measured(original, again)
    assert largest(errors) == 0
    assert not original.denoiser.conv_in._forward_hooks


@pytest.mark.parametrize("method", ["temporal_cache", "tcaq"])
def test_layers_of_rewritten_models_are_compared_where_they_run(method):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    original = compared_models.load(sampling.as_pipeline(tiny.model("unet2d")))
    packed = compared_models.load(lowtide.quantize(pipe, method=method, **QUICK))
    _, errors = measured(original, packed)
    adapter = adapt(original.denoiser)
    missing = set(adapter.layers()) - set(errors.names)
    assert missing <= {*packed.plan.blank, "time_embedding.linear_1", "time_embedding.linear_2"}
    assert largest(errors) < 1
    drift = layer_drift.temporal_drift(adapter, original, packed)
    expected = temporal_errors(adapter, original.denoiser, packed.denoiser)
    assert torch.equal(torch.tensor(drift.error, dtype=expected.dtype), expected.T)
    assert drift.timesteps == [666, 333, 0]
    assert len(drift.features) == expected.shape[1]


def test_no_temporal_drift_where_the_block_reads_more_than_time(tmp_path):
    conditions = tiny_pipelines.request_fields("dit")
    original = compared_models.load(tiny_pipelines.dit(tmp_path))
    options = relevant_options("minmax", QUICK | conditions)
    packed = lowtide.quantize(tiny_pipelines.dit(tmp_path), method="minmax", **options)
    adapter = adapt(original.denoiser)
    assert layer_drift.temporal_drift(adapter, original, compared_models.load(packed)) is None


def test_errors_where_the_reference_is_zero():
    squares = layer_drift.LayerSquares()
    zero = torch.zeros(2)
    squares.add("a", zero, zero)
    squares.add("b", torch.ones(2), zero)
    squares.add("c", torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    assert [squares.relative(name) for name in "abc"] == [0, 1, 1.25]
