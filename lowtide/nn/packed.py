"""Packed layers: codes at their true bits and the tables that give them meaning; what a checkpoint holds and what runs.

They are nn.Linear and nn.Conv2d to whoever asks (diffusers, peft), with `weight` the packed bytes.
"""

import torch
from torch import Tensor, nn

from lowtide.formats import (
    Affine,
    Mixed,
    Table,
    bundle_words,
    pack_tables,
    pack,
    pack_mixed,
    packed_bytes,
    unpack_tables,
)
from lowtide.kernels import Spec, conv2d, linear
from lowtide.nn.quantized import QuantConv2d, QuantLinear
from lowtide.nn.quantizer import Quantizer


class Packed:
    """What PackedLinear and PackedConv2d share: the buffers, shaped by the format alone, so that a skeleton can hold them."""

    format: Affine | Mixed
    input: Quantizer

    def lay_out(self, columns: int, format: Affine | Mixed, inputs: Quantizer, smooth: int) -> None:
        """Room for rows x columns of codes in this format, and for `smooth` input channels to be divided."""
        rows, self.format, self.input = self.weight.shape[0], format, inputs
        self.spec = Spec(columns, format, inputs.format.bits if inputs.format else 0).flat()
        self.weight = nn.Parameter(
            torch.empty(packed_shape(rows, columns, format), dtype=torch.uint8), requires_grad=False
        )
        self.places = grid_places(rows, columns, format, smooth)
        self.register_buffer("grid", torch.empty(bundle_words(self.places), dtype=torch.int32))

    def fill(self, layer: QuantLinear | QuantConv2d) -> None:
        """Take over the codes of a quantized layer."""
        codes, grid = layer.codes, layer.grid
        mixed = isinstance(self.format, Mixed)
        packed = pack_mixed(codes, self.format.bits) if mixed else pack(codes, self.format.bits)
        self.weight = nn.Parameter(packed, requires_grad=False)
        found = (grid.scale, grid.zero, grid.factor, layer.smooth)
        none = grid.scale.new_empty(0)
        self.grid = pack_tables(
            [part if place.count else none for part, place in zip(found, self.places, strict=True)],
            self.places,
        )
        self.bias = layer.bias

    def tables(self) -> list[Tensor]:
        """scale, zero, factor, smooth; an empty tensor for what is not there."""
        return unpack_tables(self.grid, self.places)

    def step(self) -> list[Tensor]:
        """The input's range at the running step; nothing where inputs stay in float."""
        return list(self.input.step()) if self.input.format is not None else []


def grid_places(rows: int, columns: int, format: Affine | Mixed, smooth: int) -> tuple[Table, ...]:
    """What lies in a layer's grid: scale, zero (unsigned formats), factor (grouped ones), smooth (divided inputs)."""
    groups = -(-columns // format.group) if format.group else 0
    zeros = Table((0,) if format.signed else (rows, 1), torch.uint8)
    factors = Table((rows, groups) if groups else (0,), torch.uint8)
    return Table((rows, 1), torch.float32), zeros, factors, Table((smooth,), torch.float32)


def packed_shape(rows: int, columns: int, format: Affine | Mixed) -> tuple[int, ...]:
    if isinstance(format, Mixed):
        return (sum(packed_bytes(columns, bits) for bits in format.bits),)
    return rows, packed_bytes(columns, format.bits)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on packed codes."""

    def __init__(self, layer: nn.Linear, format: Affine | Mixed, inputs: Quantizer, smooth: bool):
        nn.Linear.__init__(
            self, layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        self.lay_out(layer.in_features, format, inputs, layer.in_features if smooth else 0)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.tables(), self.step(), self.spec, self.bias)


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution on packed codes."""

    def __init__(self, layer: nn.Conv2d, format: Affine | Mixed, inputs: Quantizer, smooth: bool):
        shape = (
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        nn.Conv2d.__init__(self, *shape, layer.groups, layer.bias is not None, device="meta")
        self.shape = [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]
        columns = self.in_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]
        self.lay_out(columns, format, inputs, self.in_channels if smooth else 0)

    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.weight, self.tables(), self.step(), self.spec, self.bias, self.shape)


def packed_layer(
    layer: nn.Module, format: Affine | Mixed, inputs: Quantizer, smooth: bool
) -> PackedLinear | PackedConv2d:
    """An empty packed twin of a Linear or Conv2d."""
    return (PackedConv2d if isinstance(layer, nn.Conv2d) else PackedLinear)(
        layer, format, inputs, smooth
    )


def packed_twin(layer: QuantLinear | QuantConv2d) -> PackedLinear | PackedConv2d:
    """The packed layer with a quantized layer's codes."""
    layer.input.enabled = True
    twin = packed_layer(layer, layer.format, layer.input, layer.smooth.numel() > 0)
    twin.fill(layer)
    return twin.train(layer.training)
