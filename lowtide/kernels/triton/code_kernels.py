"""Triton kernels that turn float values into int8 codes, with a norm and an activation before.

Codes lie as rows of C bytes, each code less 128. A row is a pixel, a token, or one channel of all
tokens. The channels after the last one hold 0, and the border of an image holds the code of 0.
Each row has the sum of its codes in float32, which is NaN where a value is not a number.
"""

# The kernels are written in Triton's language, which only looks like Python to a type checker.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from lowtide.kernels.triton.device_arithmetic import activate, encode, not_a_number, step_grid


@triton.jit
def load_joined(x, x2, kept, channel, FIRST: tl.constexpr):
    """Values in float32 at these places; the channels from FIRST on come from a second tensor."""
    # The compiler follows what stands behind a return, so both cases end here.
    if x2 is None:
        value = tl.load(x, mask=kept, other=0.0).to(tl.float32)
    else:
        is_first = (channel < FIRST)[None, :]
        value = tl.load(x, mask=kept & is_first, other=0.0).to(tl.float32)
        value += tl.load(x2, mask=kept & (channel >= FIRST)[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def group_moments(
    x,
    x2,
    moments,
    sample_stride,
    channel_stride,
    pixel_stride,
    sample_stride2,
    pixel_stride2,
    pixels,
    chunk,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    SOME: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The mean, and the sum of squares around it, of each group of channels in a chunk of pixels.

    moments: (samples, chunks, GROUPS, 2). WIDTH: channels of a group; SOME: groups of a program.
    Each channel is summed around its first value, so that a large mean costs no digits.
    """
    part = tl.program_id(0)
    sample = tl.program_id(1)
    lane = tl.arange(0, SOME * WIDE)
    group = tl.program_id(2) * SOME + lane // WIDE
    has_lane = (lane % WIDE < WIDTH) & (group < GROUPS)
    channel = group * WIDTH + lane % WIDE
    start = x + sample.to(tl.int64) * sample_stride + channel.to(tl.int64) * channel_stride
    start2 = start
    if x2 is not None:
        start2 = x2 + sample.to(tl.int64) * sample_stride2 + channel.to(tl.int64) - FIRST
    first = part * chunk
    last = tl.minimum(first + chunk, pixels)
    at = tl.full((1, 1), first, tl.int64)
    origin2 = None
    if x2 is not None:
        origin2 = start2[None, :] + at * pixel_stride2
    every = has_lane[None, :]
    origin = load_joined(start[None, :] + at * pixel_stride, origin2, every, channel, FIRST)
    total = tl.zeros((ROWS, SOME * WIDE), dtype=tl.float32)
    squares = tl.zeros((ROWS, SOME * WIDE), dtype=tl.float32)
    for row in range(first, last, ROWS):
        pixel = row + tl.arange(0, ROWS)
        kept = (pixel < last)[:, None] & has_lane[None, :]
        places = start[None, :] + pixel.to(tl.int64)[:, None] * pixel_stride
        places2 = None
        if x2 is not None:
            places2 = start2[None, :] + pixel.to(tl.int64)[:, None] * pixel_stride2
        away = load_joined(places, places2, kept, channel, FIRST) - origin
        away = tl.where(kept, away, 0.0)
        total += away
        squares += away * away
    count = (last - first).to(tl.float32)
    of_channel = tl.sum(total, 0)
    mean = tl.where(has_lane, tl.sum(origin, 0) + of_channel / count, 0.0)
    around = tl.sum(squares, 0) - of_channel * of_channel / count
    means = tl.reshape(mean, (SOME, WIDE))
    of_group = tl.sum(means, 1) / WIDTH
    real = tl.reshape(has_lane, (SOME, WIDE))
    apart = tl.where(real, means - of_group[:, None], 0.0)
    spread = tl.sum(tl.reshape(around, (SOME, WIDE)), 1) + count * tl.sum(apart * apart, 1)
    which = tl.program_id(2) * SOME + tl.arange(0, SOME)
    place = moments + ((sample * tl.num_programs(0) + part) * GROUPS + which) * 2
    tl.store(place, of_group, mask=which < GROUPS)
    tl.store(place + 1, spread, mask=which < GROUPS)


@triton.jit
def group_gain(
    moments,
    sample,
    pixels,
    chunk,
    epsilon,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
):
    """1 / deviation and the mean of each group, from the moments of the chunks."""
    part = tl.arange(0, MOST_CHUNKS)
    group = tl.arange(0, MOST_GROUPS)
    kept = (part < CHUNKS)[:, None] & (group < GROUPS)[None, :]
    count = tl.minimum(chunk, pixels - part * chunk).to(tl.float32)
    count = tl.where(part < CHUNKS, count, 0.0)[:, None] * WIDTH
    place = moments + ((sample * CHUNKS + part)[:, None] * GROUPS + group[None, :]) * 2
    means = tl.load(place, mask=kept, other=0.0)
    all_values = pixels.to(tl.float32) * WIDTH
    mean = tl.sum(means * count, 0) / all_values
    apart = tl.where(kept, means - mean[None, :], 0.0)
    spread = tl.load(place + 1, mask=kept, other=0.0) + count * apart * apart
    return 1.0 / tl.sqrt_rn(tl.sum(spread, 0) / all_values + epsilon), mean


@triton.jit
def affine(value, weight, bias, channel, has_channel):
    """value * weight + bias, by channel; either may be None."""
    if weight is not None:
        by = tl.load(weight + channel, mask=has_channel, other=0.0)
        value *= by.to(tl.float32)[None, :]
    if bias is not None:
        plus = tl.load(bias + channel, mask=has_channel, other=0.0)
        value += plus.to(tl.float32)[None, :]
    return value


@triton.jit
def encode_rows(
    x,
    sample_stride,
    channel_stride,
    y_stride,
    x_stride,
    x2,
    sample_stride2,
    y_stride2,
    x_stride2,
    times,
    times_sample,
    times_y,
    times_x,
    moments,
    weight,
    bias,
    smooth,
    scale,
    zero,
    index,
    codes,
    sums,
    tall,
    wide,
    above,
    left,
    padded_tall,
    padded_wide,
    rows_per_step,
    chunk,
    epsilon,
    top,
    CHANNELS: tl.constexpr,
    FIRST: tl.constexpr,
    UP: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    MOST_GROUPS: tl.constexpr,
    CHUNKS: tl.constexpr,
    MOST_CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    SOME: tl.constexpr,
):
    """The codes of some rows of one sample, inside a border: activation(norm(x)) * times, rounded.

    x: (samples, channels, tall, wide) with any strides; the channels from FIRST on are those of x2.
    Each pixel stands UP times in both directions. `moments` None: there is no norm. `scale` None:
    the rows hold the float values.
    """
    sample = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    has_row = row < padded_tall * padded_wide
    y_at = row // padded_wide - above
    x_at = row % padded_wide - left
    is_inside = has_row & (y_at >= 0) & (y_at < tall * UP) & (x_at >= 0) & (x_at < wide * UP)
    y_of = (y_at // UP).to(tl.int64)
    x_of = (x_at // UP).to(tl.int64)
    start = sample.to(tl.int64) * sample_stride + y_of * y_stride + x_of * x_stride
    start2 = start
    if x2 is not None:
        start2 = sample.to(tl.int64) * sample_stride2 + y_of * y_stride2 + x_of * x_stride2
    of_times = start
    if times is not None:
        of_times = sample.to(tl.int64) * times_sample + y_of * times_y + x_of * times_x
    out = sample.to(tl.int64) * padded_tall * padded_wide + row
    near = tl.minimum(row, padded_tall * padded_wide - 1)
    stepped = sample * padded_tall * padded_wide + near
    if scale is not None:
        step_scale, step_zero = step_grid(scale, zero, index, stepped, rows_per_step, ONE_STEP)
    if moments is not None:
        gains, means = group_gain(
            moments,
            sample,
            tall * wide,
            chunk,
            epsilon,
            WIDTH,
            GROUPS,
            MOST_GROUPS,
            CHUNKS,
            MOST_CHUNKS,
        )
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for first in range(0, C, SOME):
        channel = first + tl.arange(0, SOME)
        has_channel = channel < CHANNELS
        kept = is_inside[:, None] & has_channel[None, :]
        places = x + start[:, None] + channel.to(tl.int64)[None, :] * channel_stride
        places2 = None
        if x2 is not None:
            places2 = x2 + start2[:, None] + (channel.to(tl.int64) - FIRST)[None, :]
        value = load_joined(places, places2, kept, channel, FIRST)
        if moments is not None:
            group = tl.minimum(channel // WIDTH, GROUPS - 1)
            value = (value - tl.gather(means, group, 0)[None, :]) * tl.gather(gains, group, 0)[
                None, :
            ]
            value = affine(value, weight, bias, channel, has_channel)
        value = activate(value, ACTIVATION)
        if times is not None:
            by = times + of_times[:, None] + channel[None, :]
            value *= tl.load(by, mask=kept, other=0.0).to(tl.float32)
        if smooth is not None:
            by = tl.load(smooth + channel, mask=has_channel, other=1.0)[None, :]
            # The plain rounding divides into the dtype of x.
            value = tl.div_rn(value, by + tl.zeros_like(value))
            value = value.to(x.dtype.element_ty).to(tl.float32)
        value = tl.where(kept, value, 0.0)
        to = codes + out[:, None] * C + channel[None, :]
        fits = has_row[:, None] & (channel < C)[None, :]
        if scale is None:
            tl.store(to, value.to(codes.dtype.element_ty), mask=fits)
        else:
            code = encode(value, step_scale, step_zero, top)
            code = tl.where(has_channel[None, :], code, 0.0)
            total += tl.sum(code + not_a_number(value), 1)
            tl.store(to, code.to(tl.int8), mask=fits)
    if scale is not None:
        tl.store(sums + out, total, mask=has_row)


@triton.jit
def encode_normed_rows(
    x,
    sample_stride,
    row_stride,
    channel_stride,
    weight,
    bias,
    gain,
    gain_stride,
    shift,
    shift_stride,
    smooth,
    scale,
    zero,
    index,
    codes,
    sums,
    rows,
    rows_per_sample,
    rows_per_step,
    epsilon,
    top,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ROWS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The codes of rows after a layer norm: norm(x) * weight + bias, then * gain + shift.

    gain and shift hold one row for each sample, as in adaLN. `scale` None: the rows hold the float
    values.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    has_row = row < rows
    has_channel = channel < CHANNELS
    kept = has_row[:, None] & has_channel[None, :]
    near = tl.minimum(row, rows - 1)
    start = (near // rows_per_sample).to(tl.int64) * sample_stride
    start += (near % rows_per_sample).to(tl.int64) * row_stride
    places = start[:, None] + channel.to(tl.int64)[None, :] * channel_stride
    value = tl.load(x + places, mask=kept, other=0.0).to(tl.float32)
    mean = tl.sum(value, 1) / CHANNELS
    value = tl.where(kept, value - mean[:, None], 0.0)
    deviation = tl.sqrt_rn(tl.sum(value * value, 1) / CHANNELS + epsilon)
    value = value / deviation[:, None]
    value = affine(value, weight, bias, channel, has_channel)
    sample = (near // rows_per_sample)[:, None]
    if gain is not None:
        by = tl.load(gain + sample * gain_stride + channel[None, :], mask=kept, other=0.0)
        value *= by.to(tl.float32)
    if shift is not None:
        plus = tl.load(shift + sample * shift_stride + channel[None, :], mask=kept, other=0.0)
        value += plus.to(tl.float32)
    if smooth is not None:
        by = tl.load(smooth + channel, mask=has_channel, other=1.0)[None, :]
        value = tl.div_rn(value, by + tl.zeros_like(value))
    value = tl.where(kept, value, 0.0)
    to = codes + row.to(tl.int64)[:, None] * C + channel[None, :]
    fits = has_row[:, None] & (channel < C)[None, :]
    if scale is None:
        tl.store(to, value.to(codes.dtype.element_ty), mask=fits)
    else:
        step_scale, step_zero = step_grid(scale, zero, index, near, rows_per_step, ONE_STEP)
        code = tl.where(has_channel[None, :], encode(value, step_scale, step_zero, top), 0.0)
        tl.store(sums + row, tl.sum(code + not_a_number(value), 1), mask=has_row)
        tl.store(to, code.to(tl.int8), mask=fits)
