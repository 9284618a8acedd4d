"""Packed layers: the input times the weight, and an epilogue that can still grow."""

from typing import Any

import torch

from lowtide.models.trace import Node
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.runtime.codes import image_codes, image_floats, token_codes, token_floats
from lowtide.runtime.layers import NativeLayer
from lowtide.runtime.layouts import Layout, Padding, pixel_shape, pixels_of, tokens_of
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View, new_view
from lowtide.runtime.producers import Product, known
from lowtide.runtime.steps import GemmStep, Output


def conv(lowering: Lowering, node: Node) -> View | None:
    """A packed convolution of an image batch (B, C, H, W)."""
    module = lowering.function(node)
    assert isinstance(module, PackedConv2d)
    view = _only_argument(lowering, node)
    layer = _native_layer(lowering, node)
    if layer is None or view is None or view.meta.dim() != 4:
        return None
    vertical, horizontal = _pair(module.padding)
    padding = Padding(vertical, horizontal, vertical, horizontal)
    if module.input.format is None:
        codes = image_floats(lowering, view, padding)
    else:
        rounding = lowering.numbers.rounding(module.input, layer.smooth)
        codes = image_codes(lowering, view, rounding, padding)
    if codes is None:
        return None
    height, width = _pair(module.kernel_size)
    down, right = _pair(module.stride)
    tall = (codes.layout.height - height) // down + 1
    wide = (codes.layout.width - width) // right + 1
    meta = pixel_shape(codes.layout.batch, tall, wide, module.out_channels)
    output = Output(new_view(meta), known(pixels_of(meta)))
    taps = _taps(codes.layout, height, width)
    return _product(lowering, str(node.target), codes, output, taps, (down, right))


def linear(lowering: Lowering, node: Node) -> View | None:
    """A packed linear layer on tokens (B, ..., C)."""
    module = lowering.function(node)
    assert isinstance(module, PackedLinear)
    view = _only_argument(lowering, node)
    layer = _native_layer(lowering, node)
    if layer is None or view is None:
        return None
    if module.input.format is None:
        codes = token_floats(lowering, view)
    else:
        rounding = lowering.numbers.rounding(module.input, layer.smooth)
        codes = token_codes(lowering, view, rounding)
    if codes is None:
        return None
    meta = torch.empty(*view.shape[:-1], module.out_features, device="meta")
    output = Output(new_view(meta), known(tokens_of(meta)))
    return _product(lowering, str(node.target), codes, output, [0], (1, 1))


def _native_layer(lowering: Lowering, node: Node) -> NativeLayer | None:
    """The layer in the kernels' order; None if they cannot run it."""
    assert isinstance(node.target, str)
    return lowering.layers.get(node.target)


def _only_argument(lowering: Lowering, node: Node) -> View | None:
    """The input of a layer that is called with nothing else."""
    view = lowering.given(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
    return view if isinstance(view, View) else None


def _pair(size: Any) -> tuple[int, int]:
    vertical, horizontal = size
    return vertical, horizontal


def _taps(layout: Layout, height: int, width: int) -> list[int]:
    """The distance of each position of a kernel window from the first, in elements."""
    places = [(place // width, place % width) for place in range(height * width)]
    return [down * layout.row + right * layout.column for down, right in places]


def _product(
    lowering: Lowering,
    name: str,
    codes: Output,
    output: Output,
    taps: list[int],
    stride: tuple[int, int],
) -> View:
    """A layer's product, whose epilogue can still grow."""
    layer = lowering.layers[name]
    step = GemmStep(
        name=name,
        codes=codes.view,
        codes_layout=codes.layout,
        rounding=codes.rounding,
        taps=torch.tensor(taps, dtype=torch.int64) * codes.view.meta.element_size(),
        weight=layer.panels,
        bias=layer.bias,
        stride=stride,
        output=output,
    )
    return lowering.draft.wait_for(output.view, Product(step))
