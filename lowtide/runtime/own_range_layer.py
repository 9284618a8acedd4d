"""A packed layer on oneDNN whose inputs have ranges of their own: one for each row or sample."""

import torch
from torch import Tensor

from lowtide.formats import OwnRange
from lowtide.kernels import divide, onednn
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.runtime.layers import integers
from lowtide.runtime.onednn_layer import OneDnnLayer, geometry


class OwnRangeLayer:
    """The product of one packed layer. A packed layer calls it in place of its operator.

    A row with scale s and zero point z, codes c and weights w has s * (c w - z * sum(w)) + bias.
    oneDNN computes c w for all rows at once.
    """

    def __init__(self, layer: PackedLinear | PackedConv2d):
        format = layer.input.format
        assert isinstance(format, OwnRange)
        self.format = format
        *_, smooth = layer.tables()
        self.is_image = isinstance(layer, PackedConv2d)
        self.smooth = smooth.reshape(-1, 1, 1) if self.is_image else smooth
        self.padding = layer.padding if isinstance(layer, PackedConv2d) else (0, 0)
        channels = layer.in_channels if isinstance(layer, PackedConv2d) else layer.in_features
        self.weight = onednn.onednn_weight(integers(layer), None, geometry(layer), channels)
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's output; None where only the operator has an answer."""
        if x.dtype != torch.float32 or not x.numel() or (self.is_image and x.dim() != 4):
            return None
        values = divide(x, self.smooth)
        grid = self.format.grid(values)
        codes = self.format.codes(values, grid)
        if codes.sum().isnan():
            return None
        codes = codes.to(torch.uint8)
        if self.is_image:
            codes = self._padded(codes, grid.zero)
        sums = self.weight.product(codes, 1.0, 0)
        output = sums.sub_(grid.zero * self.weight.offsets).mul_(grid.scale)
        if self.bias is not None:
            output += self.bias
        return output.permute(0, 3, 1, 2) if self.is_image else output

    def _padded(self, codes: Tensor, zero: Tensor) -> Tensor:
        """The codes with channels last, inside a border of the code of zero of each sample."""
        batch, channels, height, width = codes.shape
        down, across = self.padding
        tall = height + 2 * int(down)
        wide = width + 2 * int(across)
        border = zero.to(torch.uint8)
        room = torch.empty((batch, tall, wide, channels), dtype=torch.uint8).copy_(border)
        inner = room.narrow(1, int(down), height).narrow(2, int(across), width)
        inner.copy_(codes.permute(0, 2, 3, 1))
        return room


OneDnnProduct = OneDnnLayer | OwnRangeLayer


def onednn_product(layer: PackedLinear | PackedConv2d) -> OneDnnProduct:
    """The layer on oneDNN, which can run it."""
    kind = OwnRangeLayer if isinstance(layer.input.format, OwnRange) else OneDnnLayer
    return kind(layer)
