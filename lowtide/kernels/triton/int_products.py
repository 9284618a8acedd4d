"""Triton kernels of packed layers: int8 codes times 8, 4 or 2-bit weights, and the epilogue.

A linear layer is a convolution of one tap. Codes lie as pixels of C bytes, each code less 128; the
border of an image holds the code of 0. Where PER is 2 or 4, a byte of the weight holds as many
codes: byte j of a run of 32 * PER values of k holds those of j, j + 32, ... The weight is then the
first operand, because a tensor core takes that one from registers, where its bits are unpacked.

With codes x and w, zero points p and z, and 128 taken from x, a sum of products is

    sum (x - p) (w - z)  =  sum (x - 128) w  +  (128 - p) sum (w - z)  -  z sum (x - 128)

so the main loop knows no zero points. `total` holds sum (w - z) of each column. `sums` holds
sum (x - 128) of each pixel, and is NaN where a value of the pixel is not a number.
"""

# The kernels are written in Triton's language, which only looks like Python to a type checker.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from lowtide.kernels.triton.device_arithmetic import (
    activate,
    encode_product,
    not_a_number,
    step_grid,
)

RUN = tl.constexpr(32)
MOST_TAPS = tl.constexpr(16)


@triton.jit
def tile_of(rows, columns, BM: tl.constexpr, BN: tl.constexpr):
    """The tile of this program. Eight tiles below each other run together and share a weight."""
    program = tl.program_id(0)
    down = tl.cdiv(rows, BM)
    across = tl.cdiv(columns, BN)
    group = program // (8 * across)
    tall = tl.minimum(down - group * 8, 8)
    inside = program % (8 * across)
    return group * 8 + inside % tall, inside // tall


@triton.jit
def pixel_of(row, shape, VERTICAL: tl.constexpr, HORIZONTAL: tl.constexpr, FLAT: tl.constexpr):
    """The first pixel that each row reads. `shape`: of the output, then of the padded input."""
    tall, wide, padded_tall, padded_wide = shape
    pixel = row
    if not FLAT:
        sample = row // (tall * wide)
        inside = row % (tall * wide)
        y = inside // wide * VERTICAL
        x = inside % wide * HORIZONTAL
        pixel = (sample * padded_tall + y) * padded_wide + x
    return pixel


@triton.jit
def pixel_totals(
    pixel_sums,
    pixel,
    wide,
    TAPS: tl.constexpr,
    TAPS_WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
):
    """The sums of the codes that each row reads; NaN where one of them was not a number."""
    # A tile of two axes: the compiler would load a vector again for each column of the output.
    tap = tl.arange(0, MOST_TAPS)
    away = (tap // TAPS_WIDE) * DOWN * wide + (tap % TAPS_WIDE) * ACROSS
    places = pixel[:, None] + away[None, :]
    return tl.sum(tl.load(pixel_sums + places, mask=(tap < TAPS)[None, :], other=0.0), 1)


@triton.jit
def of_sample(vector, stride, sample, column, ONE_SAMPLE: tl.constexpr):
    """The values of a vector for each sample; one row of them where the tile has one sample."""
    if ONE_SAMPLE:
        values = tl.load(vector + tl.min(sample, 0) * stride + column)[None, :]
    else:
        values = tl.load(vector + sample[:, None] * stride + column[None, :])
    return values.to(tl.float32)


@triton.jit
def finished(
    sums,
    tile,
    layer,
    grid,
    late,
    sink,
    numbers,
    TAPS: tl.constexpr,
    TAPS_WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    HUGE: tl.constexpr,
):
    """Turn int32 sums (rows, columns) into the layer's output, and store it or its codes.

    layer: pixel_sums, zero, total, scale, bias, place; grid: scale, zero, index of the input;
    late: per_sample, gate, residual, and their strides;
    sink: y, its stride, smooth, scale, zero, code sums; y holds codes where there is a scale.
    """
    row, column, pixel = tile
    pixel_sums, weight_zero, total, weight_scale, bias, place = layer
    input_scale, input_zero, index = grid
    per_sample, gate, residual, sample_stride, gate_stride, residual_stride = late
    y, stride, smooth, out_scale, out_zero, out_sums = sink
    rows, columns, wide, rows_per_step, rows_per_sample, factor, top = numbers
    has_row = row < rows
    has_column = column < columns
    safe_row = tl.minimum(row, rows - 1)
    safe_column = tl.minimum(column, columns - 1)
    read = pixel_totals(pixel_sums, pixel, wide, TAPS, TAPS_WIDE, DOWN, ACROSS)
    scale, zero = step_grid(input_scale, input_zero, index, safe_row, rows_per_step, ONE_STEP)
    shift = (128.0 - zero).to(tl.int32)
    exact = sums + shift * tl.load(total + safe_column)[None, :]
    if weight_zero is not None:
        whole = tl.where(read == read, read, 0.0).to(tl.int32)
        exact -= whole[:, None] * tl.load(weight_zero + safe_column)[None, :]
    value = exact.to(tl.float32) * (scale * tl.load(weight_scale + safe_column)[None, :])
    value += not_a_number(read)[:, None]
    if bias is not None:
        value += tl.load(bias + safe_column).to(tl.float32)[None, :]
    to = safe_column
    if place is not None:
        to = tl.load(place + safe_column)
    sample = safe_row // rows_per_sample
    if per_sample is not None:
        value += of_sample(per_sample, sample_stride, sample, to, ONE_SAMPLE)
    value = activate(value, ACTIVATION)
    if gate is not None:
        value *= of_sample(gate, gate_stride, sample, to, ONE_SAMPLE)
    kept = has_row[:, None] & has_column[None, :]
    # Offsets of 32 bits take half the registers. They are enough for all but huge outputs.
    at = safe_row.to(tl.int64) if HUGE else safe_row
    start = at[:, None] * stride
    if residual is not None:
        # A float output and the residual lie alike, so that they share their addresses.
        rest = start
        if out_scale is not None:
            rest = at[:, None] * residual_stride
        held = tl.load(residual + rest + to[None, :], mask=kept, other=0.0)
        value += held.to(tl.float32)
    value *= factor
    if out_scale is not None:
        next_scale, next_zero = step_grid(
            out_scale, out_zero, index, safe_row, rows_per_step, ONE_STEP
        )
        inverse = 1.0 / next_scale
        if smooth is not None:
            inverse = inverse / tl.load(smooth + to)[None, :]
        value = encode_product(value, inverse, next_zero, top)
        # The sums are integers below 2^24, so float32 adds them exactly in any order.
        tl.atomic_add(out_sums + row, tl.sum(tl.where(kept, value, 0.0), 1), mask=has_row)
    tl.store(y + start + to[None, :], value.to(y.dtype.element_ty), mask=kept)


@triton.jit
def multiply(
    codes,
    weight,
    pixel,
    column,
    wide,
    first,
    last,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_WIDE: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    PER: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The int32 sums (BM, BN) of the steps first .. last of k."""
    SHARE: tl.constexpr = BK // PER
    STEPS: tl.constexpr = C // BK
    byte = tl.arange(0, SHARE)
    channel = byte // RUN * (RUN * PER) + byte % RUN if PER > 1 else byte
    pixels = codes + pixel.to(tl.int64) * C
    weights = weight + column.to(tl.int64) * (TAPS * C // PER)
    sums = tl.zeros((BN, BM), dtype=tl.int32)
    for step in range(first, last):
        tap = step // STEPS
        away = (tap // TAPS_WIDE) * DOWN * wide + (tap % TAPS_WIDE) * ACROSS
        start = away * C + step % STEPS * BK
        packed = tl.load(weights[:, None] + (step * SHARE + byte)[None, :])
        for field in tl.static_range(PER):
            x = tl.load(pixels[None, :] + (start + field * RUN + channel)[:, None])
            w = packed
            if PER > 1:
                bits = (packed >> (field * (8 // PER))) & (2 ** (8 // PER) - 1)
                w = bits.to(tl.int8, bitcast=True)
            sums = tl.dot(w, x, sums, out_dtype=tl.int32)
    return tl.trans(sums)


@triton.jit
def product(
    codes,
    pixel_sums,
    weight,
    weight_zero,
    total,
    weight_scale,
    bias,
    place,
    input_scale,
    input_zero,
    index,
    per_sample,
    sample_stride,
    gate,
    gate_stride,
    residual,
    residual_stride,
    y,
    stride,
    smooth,
    out_scale,
    out_zero,
    out_sums,
    part_sums,
    rows,
    columns,
    tall,
    wide,
    padded_tall,
    padded_wide,
    rows_per_step,
    rows_per_sample,
    factor,
    top,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    TAPS_WIDE: tl.constexpr,
    VERTICAL: tl.constexpr,
    HORIZONTAL: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    FLAT: tl.constexpr,
    PER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    HUGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """The layer of a tile; with SPLIT > 1, its int32 sums over one part of k, for `finish`."""
    down, across = tile_of(rows, columns, BM, BN)
    row = down * BM + tl.arange(0, BM)
    column = across * BN + tl.arange(0, BN)
    shape = (tall, wide, padded_tall, padded_wide)
    pixel = pixel_of(tl.minimum(row, rows - 1), shape, VERTICAL, HORIZONTAL, FLAT)
    near = tl.minimum(column, columns - 1)
    STEPS: tl.constexpr = TAPS * C // BK
    PART: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    part = tl.program_id(1)
    first = part * PART
    last = tl.minimum(first + PART, STEPS)
    sums = multiply(
        codes,
        weight,
        pixel,
        near,
        padded_wide,
        first,
        last,
        C,
        TAPS,
        TAPS_WIDE,
        DOWN,
        ACROSS,
        PER,
        BM,
        BN,
        BK,
    )
    if SPLIT > 1:
        start = (part.to(tl.int64) * rows + row)[:, None] * columns
        kept = (row < rows)[:, None] & (column < columns)[None, :]
        tl.store(part_sums + start + column[None, :], sums, mask=kept)
    else:
        finished(
            sums,
            (row, column, pixel),
            (pixel_sums, weight_zero, total, weight_scale, bias, place),
            (input_scale, input_zero, index),
            (per_sample, gate, residual, sample_stride, gate_stride, residual_stride),
            (y, stride, smooth, out_scale, out_zero, out_sums),
            (rows, columns, padded_wide, rows_per_step, rows_per_sample, factor, top),
            TAPS,
            TAPS_WIDE,
            DOWN,
            ACROSS,
            ACTIVATION,
            ONE_STEP,
            ONE_SAMPLE,
            HUGE,
        )


@triton.jit
def finish(
    pixel_sums,
    weight_zero,
    total,
    weight_scale,
    bias,
    place,
    input_scale,
    input_zero,
    index,
    per_sample,
    sample_stride,
    gate,
    gate_stride,
    residual,
    residual_stride,
    y,
    stride,
    smooth,
    out_scale,
    out_zero,
    out_sums,
    part_sums,
    rows,
    columns,
    tall,
    wide,
    padded_tall,
    padded_wide,
    rows_per_step,
    rows_per_sample,
    factor,
    top,
    TAPS: tl.constexpr,
    TAPS_WIDE: tl.constexpr,
    VERTICAL: tl.constexpr,
    HORIZONTAL: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    FLAT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,
    HUGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """The layer of a tile, from the int32 sums over the parts of k. Integers add exactly."""
    down, across = tile_of(rows, columns, BM, BN)
    row = down * BM + tl.arange(0, BM)
    column = across * BN + tl.arange(0, BN)
    shape = (tall, wide, padded_tall, padded_wide)
    pixel = pixel_of(tl.minimum(row, rows - 1), shape, VERTICAL, HORIZONTAL, FLAT)
    kept = (row < rows)[:, None] & (column < columns)[None, :]
    sums = tl.zeros((BM, BN), dtype=tl.int32)
    for part in range(SPLIT):
        start = (row + tl.full((), part, tl.int64) * rows)[:, None] * columns
        sums += tl.load(part_sums + start + column[None, :], mask=kept, other=0)
    finished(
        sums,
        (row, column, pixel),
        (pixel_sums, weight_zero, total, weight_scale, bias, place),
        (input_scale, input_zero, index),
        (per_sample, gate, residual, sample_stride, gate_stride, residual_stride),
        (y, stride, smooth, out_scale, out_zero, out_sums),
        (rows, columns, padded_wide, rows_per_step, rows_per_sample, factor, top),
        TAPS,
        TAPS_WIDE,
        DOWN,
        ACROSS,
        ACTIVATION,
        ONE_STEP,
        ONE_SAMPLE,
        HUGE,
    )
