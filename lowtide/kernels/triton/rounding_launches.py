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
    """gain, shift: (samples or 1, channels), as in adaLN: norm(x) * gain + shift."""

    epsilon: float = 1e-5
    weight: Tensor | None = None
    bias: Tensor | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None


@dataclass(frozen=True)
class ChunkMoments:
    """The moments of each chunk of pixels, (samples, chunks, groups, 2), and a chunk's pixels."""

    values: Tensor
    chunk: int


@dataclass(frozen=True)
class ReadPixels:
    """activation(norm(x)) * times, with the channels of `joined` behind those of x.

    All are (samples, channels, tall, wide); those of `joined` and `times` lie side by side. Each
    pixel stands `up` times in both directions.
    """

    x: Tensor
    joined: Tensor | None = None
    norm: GroupNormWeights | None = None
    moments: ChunkMoments | None = None
    activation: int = IDENTITY
    times: Tensor | None = None
    up: int = 1

    @property
    def channels(self) -> int:
        return self.x.shape[1] + (0 if self.joined is None else self.joined.shape[1])


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
    size = (samples, tall + 2 * padding[0], wide + 2 * padding[1])
    codes = RoundedRows(
        x.new_empty(*size, room, dtype=torch.int8),
        x.new_empty(size, dtype=torch.float32),
        channels,
        table,
    )
    if not codes.data.numel():
        return codes
    moments = None
    if norm is not None:
        x = x if _is_even(x) else x.contiguous()
        moments = moments_of(x, None, norm)
    store_stream(ReadPixels(x, None, norm, moments, activation), codes.data, codes, padding)
    return codes


def store_stream(
    stream: ReadPixels,
    rows: Tensor,
    codes: RoundedRows | None = None,
    border: tuple[int, int] = (0, 0),
) -> None:
    """Store float rows, (samples, tall, wide, channels), or codes. `border`: above and left."""
    x = stream.x
    samples, tall_room, wide_room, room = rows.shape
    pixels = tall_room * wide_room
    norm = stream.norm
    moments = stream.moments
    table = None if codes is None else codes.table
    some = min(256, power(room))
    count = _rows_for(x, samples * pixels, 4096 // some)
    chunks = 1 if moments is None else moments.values.shape[1]
    with on(x):
        encode_rows[(triton.cdiv(pixels, count), samples)](
            x,
            *x.stride(),
            *_pixel_strides(stream.joined),
            *_pixel_strides(stream.times),
            None if moments is None else moments.values,
            None if norm is None else norm.weight,
            None if norm is None else norm.bias,
            *_grid(table),
            rows,
            None if codes is None else codes.sums,
            *x.shape[2:],
            *border,
            tall_room,
            wide_room,
            1 if table is None else table.rows_per_step(samples * pixels),
            1 if moments is None else moments.chunk,
            0.0 if norm is None else norm.epsilon,
            0.0 if table is None else float(table.top),
            CHANNELS=stream.channels,
            FIRST=x.shape[1],
            UP=stream.up,
            C=room,
            WIDTH=1 if norm is None else stream.channels // norm.groups,
            GROUPS=1 if norm is None else norm.groups,
            MOST_GROUPS=1 if norm is None else power(norm.groups),
            CHUNKS=chunks,
            MOST_CHUNKS=power(chunks),
            ACTIVATION=stream.activation,
            ONE_STEP=table is None or table.is_one_step,
            ROWS=count,
            SOME=some,
            num_warps=4,
            **OPTIONS,
        )


def _pixel_strides(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """A tensor whose channels lie side by side, and its strides of samples, rows and columns."""
    return (None, 0, 0, 0) if x is None else (x, x.stride(0), x.stride(2), x.stride(3))


def _grid(table: StepTable | None) -> tuple[Tensor | None, ...]:
    """smooth .. index of the kernels; without a table they store floats."""
    if table is None:
        return None, None, None, None
    return table.smooth, table.scale, table.zero, table.index


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
    if rows:
        samples = x.shape[0] if x.dim() > 2 else 1
        tokens = flat.reshape(samples, rows // samples, channels)
        store_normed(tokens, norm, codes.data, codes)
    return codes


def store_normed(
    x: Tensor, norm: LayerNormWeights, to: Tensor, codes: RoundedRows | None = None
) -> None:
    """Store the rows of x (samples, tokens, channels) after a norm, as floats or as codes."""
    samples, tokens, channels = x.shape
    rows = samples * tokens
    room = to.shape[-1]
    wide = power(room)
    some = _rows_for(x, rows, max(1, 4096 // wide))
    table = None if codes is None else codes.table
    with on(x):
        encode_normed_rows[(triton.cdiv(rows, some),)](
            x,
            *x.stride(),
            norm.weight,
            norm.bias,
            norm.gain,
            sample_stride(norm.gain),
            norm.shift,
            sample_stride(norm.shift),
            *_grid(table),
            to,
            None if codes is None else codes.sums,
            rows,
            tokens,
            1 if table is None else table.rows_per_step(rows),
            norm.epsilon,
            0.0 if table is None else float(table.top),
            CHANNELS=channels,
            C=room,
            ONE_STEP=table is None or table.is_one_step,
            ROWS=some,
            WIDE=wide,
            num_warps=4 if wide <= 2048 else 8,
            **OPTIONS,
        )


def _is_even(x: Tensor) -> bool:
    """Whether the pixels of x lie at one distance from each other."""
    return x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)


def moments_of(
    x: Tensor, joined: Tensor | None, norm: GroupNormWeights, into: ChunkMoments | None = None
) -> ChunkMoments:
    """The moments of a group norm, whose pixels lie at one distance from each other.

    `into`: moments of before, whose memory is used again.
    """
    samples, _, tall, wide = x.shape
    channels = x.shape[1] + (0 if joined is None else joined.shape[1])
    pixels = tall * wide
    width = channels // norm.groups
    lanes = power(width)
    some = min(power(norm.groups), max(1, 1024 // lanes))
    programs = samples * triton.cdiv(norm.groups, some)
    wanted = max(1, min(32, 2 * card_of(capability_of(x)).processors // programs))
    chunk = max(16, triton.cdiv(pixels, wanted))
    chunks = triton.cdiv(pixels, chunk)
    size = (samples, chunks, norm.groups, 2)
    moments = x.new_empty(size, dtype=torch.float32) if into is None else into.values
    with on(x):
        group_moments[(chunks, samples, triton.cdiv(norm.groups, some))](
            x,
            joined,
            moments,
            x.stride(0),
            x.stride(1),
            _pixel_stride(x),
            0 if joined is None else joined.stride(0),
            0 if joined is None else _pixel_stride(joined),
            pixels,
            chunk,
            FIRST=x.shape[1],
            WIDTH=width,
            GROUPS=norm.groups,
            SOME=some,
            WIDE=lanes,
            ROWS=max(1, 4096 // (some * lanes)),
            num_warps=8,
            **OPTIONS,
        )
    return ChunkMoments(moments, chunk)


def _pixel_stride(x: Tensor) -> int:
    return x.stride(3) if x.shape[3] > 1 else x.stride(2)


def _rows_for(x: Tensor, rows: int, most: int) -> int:
    """Rows of one program: fewer where the card would have too few programs."""
    wanted = rows // (4 * card_of(capability_of(x)).processors)
    return max(1, min(power(max(1, most)), power(max(1, wanted))))
