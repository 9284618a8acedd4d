"""The Triton kernel of linear layers with float inputs and weights of 8, 4 or 2 bits.

The weight lies as in int_products.py. Its codes become floats in registers, less the zero point,
which is exact; the scale of a channel waits for the epilogue.
"""

# The kernels are written in Triton's language, which only looks like Python to a type checker.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

from lowtide.kernels.triton.int_products import RUN, tile_of


@triton.jit
def float_product(
    x,
    row_stride,
    weight,
    weight_zero,
    weight_scale,
    bias,
    place,
    y,
    stride,
    rows,
    columns,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
    PER: tl.constexpr,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x w' of a tile. x: rows of CHANNELS floats; the weight has C values of k.

    KIND: the type of x, or float32 for the interpreter, which has no products of bf16.
    """
    down, across = tile_of(rows, columns, BM, BN)
    row = down * BM + tl.arange(0, BM)
    column = across * BN + tl.arange(0, BN)
    near_row = tl.minimum(row, rows - 1).to(tl.int64)
    near = tl.minimum(column, columns - 1)
    SHARE: tl.constexpr = BK // PER
    byte = tl.arange(0, SHARE)
    channel = byte // RUN * (RUN * PER) + byte % RUN if PER > 1 else byte
    inputs = x + near_row * row_stride
    weights = weight + near.to(tl.int64) * (C // PER)
    sums = tl.zeros((BN, BM), dtype=tl.float32)
    for step in range(C // BK):
        packed = tl.load(weights[:, None] + (step * SHARE + byte)[None, :])
        for field in tl.static_range(PER):
            at = step * BK + field * RUN + channel
            values = tl.load(
                inputs[None, :] + at[:, None], mask=(at < CHANNELS)[:, None], other=0.0
            )
            w = packed
            if PER > 1:
                w = (packed >> (field * (8 // PER))) & (2 ** (8 // PER) - 1)
            wide = w.to(tl.float32)
            if weight_zero is not None:
                wide -= tl.load(weight_zero + near).to(tl.float32)[:, None]
            sums = tl.dot(wide.to(KIND), values.to(KIND), sums)
    value = tl.trans(sums) * tl.load(weight_scale + near)[None, :]
    if bias is not None:
        value += tl.load(bias + near).to(tl.float32)[None, :]
    to = near
    if place is not None:
        to = tl.load(place + near)
    kept = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(y + near_row[:, None] * stride + to[None, :], value.to(y.dtype.element_ty), mask=kept)
