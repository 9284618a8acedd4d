"""A Triton kernel of attention on rounded operands, with the softmax output rounded too.

The products are exact in integers. A code of the softmax needs the sum of its row, so a program
goes over the keys twice: once for the peak and the sum of each row, once for codes and values. The
queries and keys lie as rows of codes, the values as one row of all tokens for each channel.
"""

# The kernels are written in Triton's language, which only looks like Python to a type checker.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from lowtide.kernels.triton.device_arithmetic import encode_product, nearest, not_a_number

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def now(grid, step):
    """Scale and zero point of an operand at the running step."""
    scale, zero = grid
    return tl.load(scale + step), tl.load(zero + step).to(tl.float32)


@triton.jit
def scores_of(q, q_shift, numbers, bias, first, WIDE: tl.constexpr, BN: tl.constexpr):
    """The scores of some keys: q k' * factor + bias, with all integer sums exact."""
    k, k_sums, count, shift, scale = numbers
    added, start, key_stride = bias
    key = first + tl.arange(0, BN)
    has_key = key < count
    near = tl.minimum(key, count - 1)
    channel = tl.arange(0, WIDE)
    codes = tl.load(k + near[None, :] * WIDE + channel[:, None])
    sums = tl.dot(q, codes, out_dtype=tl.int32)
    read = tl.load(k_sums + near)
    whole = (tl.where(read == read, read, 0.0)).to(tl.int32) * shift
    score = (sums + q_shift[:, None] + whole[None, :]).to(tl.float32) * scale
    score += not_a_number(read)[None, :]
    if added is not None:
        places = start[:, None] + near[None, :] * key_stride
        score += tl.load(added + places).to(tl.float32)
    return tl.where(has_key[None, :], score, -float("inf"))


@triton.jit
def rounded_attention(
    q,
    q_sums,
    k,
    k_sums,
    v,
    v_sums,
    q_scale,
    q_zero,
    k_scale,
    k_zero,
    v_scale,
    v_zero,
    p_scale,
    p_zero,
    index,
    bias,
    bias_sample,
    bias_head,
    bias_row,
    bias_key,
    y,
    y_sample,
    y_head,
    y_row,
    heads,
    queries,
    keys,
    key_room,
    samples_per_step,
    factor,
    top,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """softmax(q k' * factor + bias) v of some queries of one head.

    ADAPTIVE: the zero point of the softmax is 0 or 1, and 1 means that its codes are powers of two.
    These and the values are exact in bf16, whose products run instead of integers. KIND is bf16, or
    float32 for the interpreter, which has no products of bf16.
    """
    head = tl.program_id(1)
    sample = head // heads
    step = tl.load(index + sample // samples_per_step)
    q_step, q_point = now((q_scale, q_zero), step)
    k_step, k_point = now((k_scale, k_zero), step)
    v_step, v_point = now((v_scale, v_zero), step)
    p_step, p_point = now((p_scale, p_zero), step)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    near = tl.minimum(row, queries - 1)
    channel = tl.arange(0, WIDE)
    first_query = head.to(tl.int64) * queries
    codes = tl.load(q + (first_query + near)[:, None] * WIDE + channel[None, :])
    read = tl.load(q_sums + first_query + near)
    # (q - p)(k - z) = (q - 128)(k - 128) + (128 - z) q' + (128 - p) k' + (128 - p)(128 - z).
    q_left = (128.0 - q_point).to(tl.int32)
    k_left = (128.0 - k_point).to(tl.int32)
    whole = (tl.where(read == read, read, 0.0)).to(tl.int32)
    q_shift = k_left * whole + WIDTH * q_left * k_left
    first_key = head.to(tl.int64) * keys
    # One factor for the steps of both operands, in the order of the plain product.
    scale = q_step * k_step * factor
    numbers = (k + first_key * WIDE, k_sums + first_key, keys, q_left, scale)
    start = sample.to(tl.int64) * bias_sample + (head % heads).to(tl.int64) * bias_head
    added = (bias, start + near.to(tl.int64) * bias_row, bias_key)
    peak = tl.full((BM,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    for first in range(0, keys, BN):
        score = scores_of(codes, q_shift, numbers, added, first, WIDE, BN)
        highest = tl.maximum(peak, tl.max(score, 1))
        # A row has no peak as long as all its keys are masked.
        base = tl.where(highest == -float("inf"), 0.0, highest)
        powers = tl.exp2((score - base[:, None]) * LOG2_E)
        total = total * tl.exp2((peak - base) * LOG2_E) + tl.sum(powers, 1)
        peak = highest
    v_left = (128.0 - v_point).to(tl.int32)
    p_left = (128.0 - p_point).to(tl.int32)
    values = v + head.to(tl.int64) * WIDTH * key_room
    near_channel = tl.minimum(channel, WIDTH - 1)
    if ADAPTIVE:
        sums = tl.zeros((BM, WIDE), dtype=tl.float32)
    else:
        sums = tl.zeros((BM, WIDE), dtype=tl.int32)
    p_sums = tl.zeros((BM,), dtype=tl.int32)
    is_log2 = p_point == 1.0
    for first in range(0, keys, BN):
        score = scores_of(codes, q_shift, numbers, added, first, WIDE, BN)
        share = tl.exp2((score - peak[:, None]) * LOG2_E) / total[:, None]
        key = first + tl.arange(0, BN)
        has_key = (key < keys)[None, :]
        w = tl.load(values + near_channel[None, :] * key_room + key[:, None])
        if ADAPTIVE:
            exponent = nearest(tl.minimum(-tl.log2(tl.maximum(share / p_step, 1.1754944e-38)), 1e3))
            exponent = tl.minimum(tl.maximum(exponent, 0.0), top)
            power = tl.where(exponent == top, 0.0, tl.exp2(0.0 - exponent))
            level = nearest(tl.minimum(share / p_step, top))
            p = tl.where(has_key, tl.where(is_log2, power, level), 0.0)
            wide = (w.to(tl.float32) + (128.0 - v_point)).to(KIND)
            sums = tl.dot(p.to(KIND), wide, sums)
        else:
            code = encode_product(share, 1.0 / p_step, p_point, top)
            p = tl.where(has_key & (code == code), code, 0.0).to(tl.int8)
            sums = tl.dot(p, w, sums, out_dtype=tl.int32)
            p_sums += tl.sum(p.to(tl.int32), 1)
    read_v = tl.load(v_sums + head * WIDTH + near_channel)
    # A row that has no softmax becomes NaN: one of its scores is NaN, or all its keys are masked.
    strange = tl.where(total > 0.0, 0.0, float("nan")) + not_a_number(read)
    if ADAPTIVE:
        value = sums
    else:
        whole_v = (tl.where(read_v == read_v, read_v, 0.0)).to(tl.int32)
        rest = v_left * p_sums + keys * p_left * v_left
        value = (sums + (p_left * whole_v)[None, :] + rest[:, None]).to(tl.float32)
    value = value * (p_step * v_step) + strange[:, None] + not_a_number(read_v)[None, :]
    start = sample.to(tl.int64) * y_sample + (head % heads).to(tl.int64) * y_head
    to = y + start + near.to(tl.int64)[:, None] * y_row + channel[None, :]
    kept = (row < queries)[:, None] & (channel < WIDTH)[None, :]
    tl.store(to, value.to(y.dtype.element_ty), mask=kept)
