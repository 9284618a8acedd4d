"""The Triton kernels as operators of torch, so that torch.compile sees one call with known shapes.

Each operator takes the weight as a flat list of tensors and its numbers as a flat list of integers.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from lowtide.kernels.triton.attention_launches import AttentionTables, attend
from lowtide.kernels.triton.operands import Epilogue, StepTable, Window
from lowtide.kernels.triton.product_launches import multiply, multiply_floats
from lowtide.kernels.triton.resident import ResidentWeight, Segment
from lowtide.kernels.triton.rounding_launches import round_images, round_tokens

# What Triton raises when a kernel does not compile or does not fit on the card.
FAILURES = (TritonError,)


def flat_tensors(weight: ResidentWeight) -> list[Tensor]:
    """The tensors of all segments; an empty tensor for what a segment does not have."""
    flat: list[Tensor] = []
    for segment in weight.segments:
        nothing = segment.total.new_empty(0)
        zero = nothing if segment.zero is None else segment.zero
        place = nothing if segment.place is None else segment.place
        flat += [segment.data, zero, segment.total, segment.scale, place]
    return flat


def flat_numbers(weight: ResidentWeight) -> list[int]:
    """rows, channels, taps, room, and the values in a byte of each segment."""
    widths = [segment.per for segment in weight.segments]
    return [weight.rows, weight.channels, weight.taps, weight.room, *widths]


def weight_of(tensors: list[Tensor], numbers: list[int]) -> ResidentWeight:
    """The inverse of flat_tensors and flat_numbers."""
    rows, channels, taps, room, *widths = numbers
    groups = [tensors[5 * place : 5 * place + 5] for place in range(len(widths))]
    segments = [_segment(per, *group) for per, group in zip(widths, groups, strict=True)]
    return ResidentWeight(rows, channels, taps, room, tuple(segments))


def _segment(
    per: int, data: Tensor, zero: Tensor, total: Tensor, scale: Tensor, place: Tensor
) -> Segment:
    zeros = zero if zero.numel() else None
    return Segment(per, data, zeros, total, scale, place if place.numel() else None)


def table_of(step: list[Tensor], top: int) -> StepTable:
    """`step`: scale and zero point of all steps, the running step, divisors or an empty tensor."""
    scale, zero, index, smooth = step
    return StepTable(scale, zero, index, top, smooth if smooth.numel() else None)


@torch.library.custom_op("lowtide::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor,
    weight: list[Tensor],
    numbers: list[int],
    step: list[Tensor],
    top: int,
    bias: Tensor | None,
) -> Tensor:
    """A packed linear layer; `step` empty leaves the input in float."""
    resident = weight_of(weight, numbers)
    if not step:
        return multiply_floats(x, resident, bias)
    codes = round_tokens(x, table_of(step, top), resident.room)
    y = multiply(codes, resident, Epilogue(bias), x.dtype)
    return y.reshape(*x.shape[:-1], resident.rows)


@triton_linear.register_fake
def _(
    x: Tensor,
    weight: list[Tensor],
    numbers: list[int],
    step: list[Tensor],
    top: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], numbers[0])


class _Shape(NamedTuple):
    """The integers of a convolution, each (vertical, horizontal)."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    @property
    def window(self) -> Window:
        return Window(self.kernel, self.stride, self.dilation)


def _shape_of(shape: list[int]) -> _Shape:
    pairs = [(shape[place], shape[place + 1]) for place in range(0, 8, 2)]
    return _Shape(*pairs)


@torch.library.custom_op("lowtide::triton_conv2d", mutates_args=())
def triton_conv2d(
    x: Tensor,
    weight: list[Tensor],
    numbers: list[int],
    step: list[Tensor],
    top: int,
    bias: Tensor | None,
    shape: list[int],
) -> Tensor:
    """A packed convolution. `shape`: kernel, stride, padding and dilation, as pairs."""
    resident = weight_of(weight, numbers)
    geometry = _shape_of(shape)
    codes = round_images(x, table_of(step, top), resident.room, geometry.padding)
    y = multiply(codes, resident, Epilogue(bias), x.dtype, geometry.window)
    return y.permute(0, 3, 1, 2)


@triton_conv2d.register_fake
def _(
    x: Tensor,
    weight: list[Tensor],
    numbers: list[int],
    step: list[Tensor],
    top: int,
    bias: Tensor | None,
    shape: list[int],
) -> Tensor:
    geometry = _shape_of(shape)
    tall = x.shape[2] + 2 * geometry.padding[0]
    wide = x.shape[3] + 2 * geometry.padding[1]
    size = (x.shape[0], *geometry.window.output(tall, wide), numbers[0])
    return x.new_empty(size).permute(0, 3, 1, 2)


@torch.library.custom_op("lowtide::triton_attention", mutates_args=())
def triton_attention(
    operands: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    index: Tensor,
    tops: list[int],
    bias: Tensor | None,
    factor: float,
) -> Tensor:
    """Attention on rounded operands. operands: query, key, value.

    scales, zeros: of q, k, v and the softmax at all steps; tops: their last codes, and 1 where the
    softmax may be log2.
    """
    *last, adaptive = tops
    parts = zip(scales, zeros, last, strict=True)
    q, k, v, softmax = (StepTable(scale, zero, index, top) for scale, zero, top in parts)
    query, key, value = operands
    return attend(
        query, key, value, AttentionTables(q, k, v, softmax, bool(adaptive)), bias, factor
    )


@triton_attention.register_fake
def _(
    operands: list[Tensor],
    scales: list[Tensor],
    zeros: list[Tensor],
    index: Tensor,
    tops: list[int],
    bias: Tensor | None,
    factor: float,
) -> Tensor:
    samples, heads, queries, width = operands[0].shape
    return operands[0].new_empty(samples, queries, heads, width).transpose(1, 2)
