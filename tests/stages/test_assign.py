"""Assign: which layers get formats, and why the others stay in float."""

import tiny
import torch

import lowtide


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
