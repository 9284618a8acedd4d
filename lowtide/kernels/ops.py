"""The operators `lowtide::linear` and `lowtide::conv2d`: schema, and meaning in plain torch.

A packed layer calls one operator. What is registered here is the reference: unpack the weight, round the input to its
grid, multiply in the input's own dtype. A faster twin registers itself for a device with
`kernels.linear.register_kernel("cuda")` and must agree with this one.

    x       the float input
    weight  packed codes (uint8), rows x bytes, or flat when bits differ by row
    grid    [scale, zero, factor] of the weight and [smooth] of the input, what its channels are divided by first;
            an empty tensor stands for one that is not there
    step    [scale, zero] of the input at the running timestep, shape () or (batch,); an empty list leaves the input float
    spec    integers of a Spec, see there
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.formats import Affine, Format, Grid, Mixed, unpack, unpack_mixed


@dataclass(frozen=True)
class Spec:
    """The integers an operator needs, as one flat list: columns, group, signed, input bits, then the weight's bits."""

    columns: int
    weight: Affine | Mixed
    input_bits: int

    def flat(self) -> list[int]:
        bits = self.weight.bits if isinstance(self.weight, Mixed) else (self.weight.bits,)
        return [
            self.columns,
            self.weight.group or 0,
            int(self.weight.signed),
            self.input_bits,
            *bits,
        ]

    @classmethod
    def of(cls, flat: list[int]) -> "Spec":
        columns, group, signed, input_bits, *bits = flat
        if len(bits) > 1:
            return cls(columns, Mixed(tuple(bits), bool(signed)), input_bits)
        return cls(columns, Affine(bits[0], bool(signed), 0, group or None), input_bits)


def per_sample(part: Tensor, x: Tensor) -> Tensor:
    """One number for all of x, or one for each sample of it; attention folds heads into the batch, so a sample may be rows."""
    return (
        part.repeat_interleave(x.shape[0] // len(part)).reshape(-1, *[1] * (x.dim() - 1))
        if part.dim()
        else part
    )


def quantize_input(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The input on its grid, computed in float32 and handed back in its own dtype; one range, or one per sample."""
    scale, zero = per_sample(scale, x), per_sample(zero, x).to(torch.float32)
    codes = (x.to(torch.float32) / scale).round_().add_(zero).clamp_(0, top)
    return codes.sub_(zero).mul_(scale).to(x.dtype)


def divide(x: Tensor, smooth: Tensor) -> Tensor:
    """The input with each channel divided, computed in float32; as it is where nothing is to be divided."""
    return (x.to(torch.float32) / smooth).to(x.dtype) if smooth.numel() else x


def unpack_weight(weight: Tensor, grid: list[Tensor], spec: Spec) -> Tensor:
    """The weight's values in float32, rows x columns."""
    scale, zero, factor, _ = grid
    form: Format = spec.weight
    undo = unpack_mixed if isinstance(form, Mixed) else unpack
    codes = undo(weight, form.bits, spec.columns)
    if zero.numel() == 0:
        zero = (
            form.params(-scale, scale).zero
            if factor.numel() == 0
            else scale.new_full((1, 1), 2 ** (form.bits - 1))
        )
    return form.decode(codes, Grid(scale, zero.float(), factor if factor.numel() else None))


def on_grid(x: Tensor, smooth: Tensor, step: list[Tensor], spec: Spec) -> Tensor:
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
    meaning = Spec.of(spec)
    values = unpack_weight(weight, grid, meaning)
    return F.linear(
        on_grid(x, grid[3], step, meaning),
        values.to(x.dtype),
        None if bias is None else bias.to(x.dtype),
    )


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
    meaning, (kernel, stride, padding, dilation, groups) = Spec.of(spec), geometry(shape)
    values = unpack_weight(weight, grid, meaning).reshape(grid[0].shape[0], -1, *kernel)
    bias = None if bias is None else bias.to(x.dtype)
    x = on_grid(x, grid[3].reshape(-1, 1, 1), step, meaning)
    return F.conv2d(x, values.to(x.dtype), bias, stride, padding, dilation, groups)


def geometry(shape: list[int]) -> tuple[list[int], list[int], list[int], list[int], int]:
    return shape[0:2], shape[2:4], shape[4:6], shape[6:8], shape[8]


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
    kernel, stride, padding, dilation, _ = geometry(shape)
    height, width = (
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    )
    return x.new_empty(x.shape[0], grid[0].shape[0], height, width)
