"""Assign: which layers get formats, and why the others stay in float."""

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.formats import Affine
from lowtide.models import adapt
from lowtide.nn.plan import LayerPlan
from lowtide.settings import Settings
from lowtide.stages.assign import Assign, weight_format
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect


def test_convolutions_with_other_padding_stay_in_float():
    model = tiny.unet2d()
    model.conv_out.padding_mode = "reflect"
    block = model.down_blocks[0].resnets[0]
    block.conv1.padding = "same"
    quantized = lowtide.quantize(model, method="minmax", steps=2, images=2)
    left = quantized.plan.left
    assert left["conv_out"] == "its padding is of kind reflect"
    assert left["down_blocks.0.resnets.0.conv1"] == "its padding is 'same'"
    assert "conv_out" not in quantized.plan.layers
    assert type(model.conv_out) is type(block.conv1) is torch.nn.Conv2d


@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("bits", [1, 2, 7, 8, 16, 32])
def test_a_weight_is_symmetric_where_its_codes_would_not_fit_an_int8(bits, group):
    form = weight_format(bits, group)
    symmetric = group is not None or bits in (1, 8)
    expected = None if bits > 8 else Affine(bits, signed=symmetric, axis=0, group=group)
    assert form == expected


def assigned(**settings) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(steps=3, images=1, **settings), "test")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


@pytest.mark.parametrize(("weights", "inputs", "group"), [(3, 5, 16), (16, 5, None), (3, 16, None)])
def test_the_full_profile_rounds_all_but_the_inputs_of_the_ends(weights, inputs, group):
    """The weights of the first and the last layer have eight bits."""
    job = assigned(weights=weights, inputs=inputs, group=group)
    weight = weight_format(weights, group)
    inner = LayerPlan(weight, Affine(inputs) if inputs < 16 else None, per_step=True)
    end = LayerPlan(Affine(8, signed=True, axis=0), None, per_step=True)
    ends = {"conv_in", "conv_out"}
    names = job.adapter.layers().keys()
    expected = dict.fromkeys(names - ends, inner) | (dict.fromkeys(ends, end) if weight else {})
    assert job.plan.layers == expected
    parts = dict.fromkeys(("q", "k", "v", "softmax"), LayerPlan(None, inner.input, per_step=True))
    attentions = job.adapter.attentions() if inner.input else ()
    assert job.plan.attentions == dict.fromkeys(attentions, parts)
    said = {f"input of {name}" for name in ends} if inner.input else set()
    assert {name for name in job.plan.left if name.startswith("input of")} == said
    assert job.plan.left["conv_norm_out"] == "GroupNorm, not a matrix product"
    assert "mid_block.resnets.0.conv1" not in job.plan.left
    assert job.plan.timesteps == tuple(sorted((call.timestep for call in job.calls), reverse=True))
    assert job.plan.times == tuple(map(float, job.plan.timesteps))


def shortcuts_of_the_way_up() -> list[str]:
    places = [(block, resnet) for block in range(2) for resnet in range(2)]
    return [f"up_blocks.{block}.resnets.{resnet}" for block, resnet in places]
