"""Inputs that take the range of their own values as the network runs, with every other stage."""

import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide.errors import BadInput
from lowtide.formats import Affine, OwnRange

OWN = {"assign": {"own_ranges": True}}
FEW = {"steps": 3, "images": 2, "iters": 2, "batch": 2, "calibration_steps": 2}
# By token in linear layers, by sample in convolutions.
AXES = {"Linear": 1, "Conv2d": 3}


def packed(name: str, folder, **options) -> lowtide.Quantized:
    pipe = tiny_pipelines.PIPELINES[name](folder)
    given = FEW | tiny_pipelines.request_fields(name) | options
    return lowtide.quantize(pipe, stages=OWN, **given)


@pytest.fixture(scope="module")
def ddim(tmp_path_factory):
    return packed("ddim", tmp_path_factory.mktemp("ddim"), method="best", weights=4, inputs=8)


def test_layers_have_their_own_ranges_and_attention_has_calibrated_ones(ddim):
    inputs = {name: plan.input for name, plan in ddim.plan.layers.items() if plan.input}
    assert inputs
    for name, form in inputs.items():
        kind = type(ddim.model.get_submodule(name)).__name__.removeprefix("Packed")
        assert form == OwnRange(8, axes=AXES[kind])
    assert ddim.plan.attentions
    for parts in ddim.plan.attentions.values():
        assert isinstance(parts["q"].input, Affine)


def test_it_is_saved_and_loaded_to_the_bit(ddim, tmp_path):
    again = lowtide.load(ddim.save(tmp_path / "packed"))
    x = torch.randn(2, 3, 8, 8)
    for time in ddim.plan.timesteps:
        assert torch.equal(again.unet(x, time)[0], ddim.model(x, time)[0])


def test_values_far_beyond_the_calibrated_ones_are_not_clipped(ddim):
    """What a calibrated range cuts off, an own range follows."""
    x = 1000 * torch.randn(2, 16, 8, 8)
    name = next(name for name, plan in ddim.plan.layers.items() if plan.input)
    rounded = ddim.model.get_submodule(name).input(x)
    assert (rounded - x).norm() < 0.02 * x.norm()


def test_float_inputs_have_no_range(tmp_path):
    with pytest.raises(BadInput, match="own_ranges with inputs of 16 bits"):
        packed("ddim", tmp_path, method="tfmq", inputs=16)
