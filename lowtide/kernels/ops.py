"""The operators `lowtide::linear` and `lowtide::conv2d`: schema and reference in plain torch.

A packed layer calls one operator. The function registered here is the reference: unpack the weight,
round the input to its grid, multiply in the dtype of the input. A faster kernel registers itself
for a device with `kernels.linear.register_kernel("cuda")` and must agree with the reference.

    x       the float input
    weight  packed codes (uint8), rows x bytes, or flat when bits differ by row
    grid    [scale, zero, factor] of the weight, and [smooth], the divisors of the input channels;
            an empty tensor stands for a table that the layer does not have
    step    [scale, zero] of the input at the running timestep, shape () or (batch,);
            an empty list leaves the input in float
    spec    the integers of a Spec
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.formats import Affine, Grid, Mixed, WeightFormat, unpack, unpack_mixed


@dataclass(frozen=True)
class Spec:
    """The integers that an operator needs.

    As one flat list: columns, group (0 for none), signed, input bits, then the bits of the weight:
    one number, or one for each row.
    """

    columns: int
    weight: WeightFormat
    input_bits: int

    def flat(self) -> list[int]:
        bits = self.weight.bits if isinstance(self.weight, Mixed) else (self.weight.bits,)
        group = self.weight.group or 0
        return [self.columns, group, int(self.weight.signed), self.input_bits, *bits]

    @classmethod
    def of(cls, flat: list[int]) -> "Spec":
        """The inverse of flat."""
        columns, group, signed, input_bits, *bits = flat
        if len(bits) > 1:
            return cls(columns, Mixed(tuple(bits), signed=bool(signed)), input_bits)
        weight = Affine(bits[0], signed=bool(signed), axis=0, group=group or None)
        return cls(columns, weight, input_bits)


def per_sample(part: Tensor, x: Tensor) -> Tensor:
    """One number for the whole of x, or one for each sample, in a shape that broadcasts to x.

    Attention folds its heads into the batch, so a sample may be several rows of x.
    """
    if not part.dim():
        return part
    repeats = x.shape[0] // len(part)
    return part.repeat_interleave(repeats).reshape(-1, *[1] * (x.dim() - 1))


def quantize_input(x: Tensor, scale: Tensor, zero: Tensor, top: int | Tensor) -> Tensor:
    """The input rounded to its grid, with one range for all samples or one for each.

    The arithmetic is in float32, the result has the dtype of x. The last code is `top`, which
    broadcasts against x.
    """
    scale = per_sample(scale, x)
    zero = per_sample(zero, x).to(torch.float32)
    codes = (x.to(torch.float32) / scale).round_().add_(zero)
    codes = codes.clamp_(0, top) if isinstance(top, int) else codes.clamp_(min=0).minimum(top)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def divide(x: Tensor, smooth: Tensor) -> Tensor:
    """The input with each channel divided in float32, or unchanged where `smooth` is empty."""
    return (x.to(torch.float32) / smooth).to(x.dtype) if smooth.numel() else x


def unpack_weight(weight: Tensor, grid: list[Tensor], spec: Spec) -> Tensor:
    """The values of the weight in float32, rows x columns."""
    scale, zero, factor, _ = grid
    if zero.numel() == 0:
        zero = zero_point(spec.weight, scale, factor)
    factors = factor if factor.numel() else None
    return spec.weight.decode(unpack_codes(weight, spec), Grid(scale, zero.float(), factors))


def unpack_codes(weight: Tensor, spec: Spec) -> Tensor:
    if isinstance(spec.weight, Mixed):
        return unpack_mixed(weight, spec.weight.bits, spec.columns)
    return unpack(weight, spec.weight.bits, spec.columns)


def zero_point(format: WeightFormat, scale: Tensor, factor: Tensor) -> Tensor:
    """The zero point of a signed format, which no table stores."""
    if isinstance(format, Affine) and (factor.numel() or format.bits > 1):
        return scale.new_full((1, 1), 2 ** (format.bits - 1))
    return format.params(-scale, scale).zero


def _round_input(x: Tensor, smooth: Tensor, step: list[Tensor], spec: Spec) -> Tensor:
    x = divide(x, smooth)
    return quantize_input(x, step[0], step[1], 2**spec.input_bits - 1) if step else x


@torch.library.custom_op("lowtide::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    grid: list[Tensor],
    step: list[Tensor],
    spec: list[int],
    bias: Tensor | None,
) -> Tensor:
    layer = Spec.of(spec)
    values = unpack_weight(weight, grid, layer).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return F.linear(_round_input(x, grid[3], step, layer), values, bias)


@linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    grid: list[Tensor],
    step: list[Tensor],
    spec: list[int],
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], grid[0].shape[0])


@torch.library.custom_op("lowtide::conv2d", mutates_args=())
def conv2d(
    x: Tensor,
    weight: Tensor,
    grid: list[Tensor],
    step: list[Tensor],
    spec: list[int],
    bias: Tensor | None,
    shape: list[int],
) -> Tensor:
    """`shape`: kernel height and width, then stride, padding and dilation as pairs, then groups."""
    layer = Spec.of(spec)
    kernel, stride, padding, dilation, groups = _geometry(shape)
    values = unpack_weight(weight, grid, layer).reshape(grid[0].shape[0], -1, *kernel).to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    x = _round_input(x, grid[3].reshape(-1, 1, 1), step, layer)
    return F.conv2d(x, values, bias, stride, padding, dilation, groups)


class _Geometry(NamedTuple):
    """The integers of a convolution; all but the number of groups are (vertical, horizontal)."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


def _geometry(shape: list[int]) -> _Geometry:
    return _Geometry(shape[0:2], shape[2:4], shape[4:6], shape[6:8], shape[8])


@conv2d.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    grid: list[Tensor],
    step: list[Tensor],
    spec: list[int],
    bias: Tensor | None,
    shape: list[int],
) -> Tensor:
    kernel, stride, padding, dilation, groups = _geometry(shape)
    values = x.new_empty(grid[0].shape[0], x.shape[1] // groups, *kernel)
    # torch knows in which cases its convolution keeps the channels side by side.
    return F.conv2d(torch.empty_like(x), values, None, stride, padding, dilation, groups)
