"""Launches that round float tensors to codes, alone or after a norm. None waits for the device."""

# triton is not installed everywhere, and a launch also takes options of Triton's compiler.
# pyright: reportMissingImports=false, reportCallIssue=false

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from lowtide.kernels.native_library import IDENTITY
from lowtide.kernels.triton.code_kernels import encode_normed_rows, encode_rows, group_moments
from lowtide.kernels.triton.operands import (
    OPTIONS,
    RoundedRows,
    StepTable,
    capability_of,
    on,
    power,
    sample_stride,
)
from lowtide.kernels.triton.tiles import card_of


@dataclass(frozen=True)
class GroupNormWeights:
    groups: int
    epsilon: float = 1e-5
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class LayerNormWeights:
    """gain, shift: (samples or 1, channels), as in adaLN: norm(x) * (1 + gain) + shift."""

    epsilon: float = 1e-5
    weight: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None


def round_images(
    x: Tensor,
    table: StepTable,
    room: int,
    padding: tuple[int, int] = (0, 0),
    norm: GroupNormWeights | None = None,
    activation: int = IDENTITY,
) -> RoundedRows:
    """The codes of activation(norm(x)), x (samples, channels, tall, wide), inside a border."""
    samples, channels, tall, wide = x.shape
    tall_room = tall + 2 * padding[0]
    wide_room = wide + 2 * padding[1]
    codes = RoundedRows(
        x.new_empty(samples, tall_room, wide_room, room, dtype=torch.int8),
        x.new_empty(samples, tall_room, wide_room, dtype=torch.float32),
        channels,
        table,
    )
    if not codes.data.numel():
        return codes
    pixels = tall_room * wide_room
    moments = None
    chunk = 1
    if norm is not None:
        x = x if _is_even(x) else x.contiguous()
        moments, chunk = _moments(x, norm)
    some = min(256, power(room))
    rows = _rows_for(x, samples * pixels, 4096 // some)
    chunks = 1 if moments is None else moments.shape[1]
    with on(x):
        encode_rows[(triton.cdiv(pixels, rows), samples)](
            x,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            x.stride(3),
            moments,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            table.smooth,
            table.scale,
            table.zero,
            table.index,
            codes.data,
            codes.sums,
            tall,
            wide,
            *padding,
            tall_room,
            wide_room,
            table.rows_per_step(samples * pixels),
            chunk,
            0.0 if norm is None else norm.epsilon,
            float(table.top),
            CHANNELS=channels,
            C=room,
            WIDTH=1 if norm is None else channels // norm.groups,
            GROUPS=1 if norm is None else norm.groups,
            MOST_GROUPS=1 if norm is None else power(norm.groups),
            CHUNKS=chunks,
            MOST_CHUNKS=power(chunks),
            ACTIVATION=activation,
            ONE_STEP=table.is_one_step,
            ROWS=rows,
            SOME=some,
            num_warps=4,
            **OPTIONS,
        )
    return codes


def round_tokens(
    x: Tensor, table: StepTable, room: int, norm: LayerNormWeights | None = None
) -> RoundedRows:
    """The codes of the rows of x (..., channels), after a layer norm if there is one.

    With gain and shift, x is (samples, tokens, channels).
    """
    flat = x.reshape(-1, x.shape[-1])
    rows, channels = flat.shape
    if norm is None:
        return round_images(flat.T[None, :, :, None], table, room)
    codes = RoundedRows(
        x.new_empty(1, rows, 1, room, dtype=torch.int8),
        x.new_empty(1, rows, 1, dtype=torch.float32),
        channels,
        table,
    )
    if not rows:
        return codes
    wide = power(room)
    some = _rows_for(x, rows, max(1, 4096 // wide))
    samples = x.shape[0]
    with on(x):
        encode_normed_rows[(triton.cdiv(rows, some),)](
            flat,
            flat.stride(0),
            flat.stride(1),
            norm.weight,
            norm.bias,
            norm.gain,
            sample_stride(norm.gain),
            norm.shift,
            sample_stride(norm.shift),
            table.smooth,
            table.scale,
            table.zero,
            table.index,
            codes.data,
            codes.sums,
            rows,
            rows // samples,
            table.rows_per_step(rows),
            norm.epsilon,
            float(table.top),
            CHANNELS=channels,
            C=room,
            ONE_STEP=table.is_one_step,
            ROWS=some,
            WIDE=wide,
            num_warps=4 if wide <= 2048 else 8,
            **OPTIONS,
        )
    return codes


def _is_even(x: Tensor) -> bool:
    """Whether the pixels of x lie at one distance from each other."""
    return x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def _moments(x: Tensor, norm: GroupNormWeights) -> tuple[Tensor, int]:
    """The moments of each chunk of pixels (samples, chunks, groups, 2), and a chunk's pixels."""
    samples, channels, tall, wide = x.shape
    pixels = tall * wide
    width = channels // norm.groups
    lanes = power(width)
    some = min(power(norm.groups), max(1, 1024 // lanes))
    programs = samples * triton.cdiv(norm.groups, some)
    wanted = max(1, min(32, 2 * card_of(capability_of(x)).processors // programs))
    chunk = max(16, triton.cdiv(pixels, wanted))
    chunks = triton.cdiv(pixels, chunk)
    moments = x.new_empty(samples, chunks, norm.groups, 2, dtype=torch.float32)
    with on(x):
        group_moments[(chunks, samples, triton.cdiv(norm.groups, some))](
            x,
            moments,
            x.stride(0),
            x.stride(1),
            x.stride(3) if wide > 1 else x.stride(2),
            pixels,
            chunk,
            WIDTH=width,
            GROUPS=norm.groups,
            SOME=some,
            WIDE=lanes,
            ROWS=max(1, 4096 // (some * lanes)),
            num_warps=8,
            **OPTIONS,
        )
    return moments, chunk


def _rows_for(x: Tensor, rows: int, most: int) -> int:
    """Rows of one program: fewer where the card would have too few programs."""
    wanted = rows // (4 * card_of(capability_of(x)).processors)
    return max(1, min(power(max(1, most)), power(max(1, wanted))))
