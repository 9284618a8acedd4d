"""Packed layers: the input times the weight, and an epilogue that can still grow."""

from dataclasses import dataclass
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
        rounding = lowering.numbers.rounding(module.input, layer.smooth, layer.room)
        codes = image_codes(lowering, view, rounding, padding)
    if codes is None:
        return None
    geometry = PixelWindow(*map(_pair, (module.kernel_size, module.stride, module.dilation)))
    tall, wide = geometry.output(codes.layout.height, codes.layout.width)
    size = (codes.layout.batch, tall, wide, module.out_channels)
    meta = pixel_shape(*size, view.meta.dtype)
    output = Output(new_view(meta), known(pixels_of(meta)))
    return _product(lowering, str(node.target), codes, output, geometry)


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
        rounding = lowering.numbers.rounding(module.input, layer.smooth, layer.room)
        codes = token_codes(lowering, view, rounding)
    if codes is None:
        return None
    shape = (*view.shape[:-1], module.out_features)
    meta = torch.empty(shape, dtype=view.meta.dtype, device="meta")
    output = Output(new_view(meta), known(tokens_of(meta)))
    return _product(lowering, str(node.target), codes, output, PixelWindow())


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


@dataclass(frozen=True)
class PixelWindow:
    """The window of a convolution, each (vertical, horizontal); a linear layer has one pixel."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def output(self, height: int, width: int) -> list[int]:
        axes = zip((height, width), self.kernel, self.stride, self.dilation, strict=True)
        return [(size - apart * (taps - 1) - 1) // step + 1 for size, taps, step, apart in axes]

    def taps(self, layout: Layout) -> list[int]:
        """The distance of each position of the window from the first, in elements."""
        height, width = self.kernel
        down, right = self.dilation
        places = [(place // width, place % width) for place in range(height * width)]
        return [y * down * layout.row + x * right * layout.column for y, x in places]


def _product(
    lowering: Lowering, name: str, codes: Output, output: Output, geometry: PixelWindow
) -> View:
    """A layer's product, whose epilogue can still grow."""
    layer = lowering.layers[name]
    step = GemmStep(
        name=name,
        codes=codes.view,
        codes_layout=codes.layout,
        rounding=codes.rounding,
        sums=codes.sums,
        taps=torch.tensor(geometry.taps(codes.layout)) * codes.view.meta.element_size(),
        weight=layer.weight,
        bias=layer.bias,
        kernel=geometry.kernel,
        stride=geometry.stride,
        dilation=geometry.dilation,
        output=output,
    )
    return lowering.draft.wait_for(output.view, Product(step))
