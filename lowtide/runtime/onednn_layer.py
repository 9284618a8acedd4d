"""A packed layer on oneDNN, layer by layer: where no native kernel runs it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lowtide.formats import Affine
from lowtide.kernels import divide, onednn
from lowtide.kernels.onednn import Geometry, OneDnnWeight
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.runtime.layers import integers, no_integers


class OneDnnLayer:
    """The product of one packed layer. A packed layer calls it in place of its operator."""

    def __init__(self, layer: PackedLinear | PackedConv2d):
        format = layer.input.format
        assert isinstance(format, Affine)
        *_, smooth = layer.tables()
        self.input = layer.input
        self.top = format.top
        self.is_image = isinstance(layer, PackedConv2d)
        self.smooth = smooth.reshape(-1, 1, 1) if self.is_image else smooth
        self.padding = layer.padding if isinstance(layer, PackedConv2d) else (0, 0)
        channels = layer.in_channels if isinstance(layer, PackedConv2d) else layer.in_features
        self.weight = onednn_weight(layer, channels)

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's output; None where only the operator has an answer."""
        scale, zero = self.input.step()
        if x.dtype != torch.float32 or not x.numel() or scale.dim():
            return None
        codes = divide(x, self.smooth).div(scale).round_().add_(zero).clamp_(0, self.top)
        if codes.sum().isnan():
            return None
        point = int(zero)
        if not self.is_image:
            return self.weight.product(codes.to(torch.uint8), float(scale), point)
        padded = self._padded(codes.to(torch.uint8), point)
        return self.weight.product(padded, float(scale), point).permute(0, 3, 1, 2)

    def _padded(self, codes: Tensor, zero: int) -> Tensor:
        """The codes with channels last, inside a border of the code of zero."""
        batch, channels, height, width = codes.shape
        down, across = self.padding
        tall = height + 2 * int(down)
        wide = width + 2 * int(across)
        room = torch.full((batch, tall, wide, channels), zero, dtype=torch.uint8)
        inner = room.narrow(1, int(down), height).narrow(2, int(across), width)
        inner.copy_(codes.permute(0, 2, 3, 1))
        return room


def onednn_weight(layer: PackedLinear | PackedConv2d, channels: int) -> OneDnnWeight:
    """The weight for codes with this many channels a pixel."""
    bias = None if layer.bias is None else layer.bias.detach()
    return onednn.onednn_weight(integers(layer), bias, geometry(layer), channels)


def geometry(layer: PackedLinear | PackedConv2d) -> Geometry:
    if not isinstance(layer, PackedConv2d):
        return Geometry()
    pairs = (layer.kernel_size, layer.stride, layer.dilation)
    kernel, stride, dilation = ((pair[0], pair[1]) for pair in pairs)
    return Geometry(kernel, stride, dilation, layer.groups)


def unsupported(layer: PackedLinear | PackedConv2d) -> str:
    """Why oneDNN cannot run this layer; empty if it can."""
    reason = no_integers(layer) or onednn.unsupported()
    if reason or not isinstance(layer, PackedConv2d):
        return reason
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        return f"its padding is {layer.padding} of {layer.padding_mode}"
    return ""


@contextmanager
def on_onednn(
    products: Mapping[PackedLinear | PackedConv2d, Callable[[Tensor], Tensor | None]],
) -> Iterator[None]:
    """Within the context, these layers run on oneDNN."""
    for layer, product in products.items():
        layer.product = product
    try:
        yield
    finally:
        for layer in products:
            layer.product = None
