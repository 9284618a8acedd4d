"""The launch of attention on rounded operands."""

# triton is not installed everywhere, and a launch also takes options of Triton's compiler.
# pyright: reportMissingImports=false, reportCallIssue=false

import math
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from lowtide.kernels.triton.attention_kernels import rounded_attention
from lowtide.kernels.triton.operands import (
    OPTIONS,
    StepTable,
    capability_of,
    kind_of_products,
    on,
    power,
)
from lowtide.kernels.triton.rounding_launches import round_images
from lowtide.kernels.triton.tiles import INTERPRETER

WIDEST = 256  # channels of a head
NARROWEST = 32  # values of k that an int8 tensor core takes


@dataclass(frozen=True)
class AttentionTables:
    """The grids of the operands and of the softmax; `adaptive`: the softmax may be log2."""

    q: StepTable
    k: StepTable
    v: StepTable
    softmax: StepTable
    adaptive: bool = False


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: AttentionTables,
    bias: Tensor | None = None,
    factor: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """softmax(q k' * factor + bias) v, (samples, heads, tokens, width) with any strides.

    The bias broadcasts to (samples, heads, queries, keys). The result is dense as (samples, tokens,
    heads, width), because a linear layer reads it so. `out`: where it is stored.
    """
    samples, heads, queries, width = query.shape
    keys = key.shape[2]
    y = query.new_empty(samples, queries, heads, width).transpose(1, 2) if out is None else out
    if not y.numel():
        return y
    wide = max(NARROWEST, power(width))
    rows, some = _tile(query, wide, adaptive=tables.adaptive)
    room = triton.cdiv(keys, max(some, 64)) * max(some, 64)
    # A row of codes is a token of q and k, and a channel of v.
    q = round_images(query.permute(0, 3, 1, 2), tables.q, wide)
    k = round_images(key.permute(0, 3, 1, 2), tables.k, wide)
    v = round_images(value.permute(0, 2, 1, 3), tables.v, room)
    spread = None if bias is None else bias.expand(samples, heads, queries, keys)
    strides = (0, 0, 0, 0) if spread is None else spread.stride()
    with on(query):
        rounded_attention[(triton.cdiv(queries, rows), samples * heads)](
            q.data,
            q.sums,
            k.data,
            k.sums,
            v.data,
            v.sums,
            tables.q.scale,
            tables.q.zero,
            tables.k.scale,
            tables.k.zero,
            tables.v.scale,
            tables.v.zero,
            tables.softmax.scale,
            tables.softmax.zero,
            tables.q.index,
            spread,
            *strides,
            y,
            *y.stride()[:3],
            heads,
            queries,
            keys,
            room,
            tables.q.rows_per_step(samples),
            factor or 1 / math.sqrt(width),
            float(tables.softmax.top),
            WIDTH=width,
            WIDE=wide,
            ADAPTIVE=tables.adaptive,
            KIND=kind_of_products(query, tl.bfloat16),
            BM=rows,
            BN=some,
            num_warps=4 if wide <= 64 else 8,
            num_stages=2,
            **OPTIONS,
        )
    return y


def _tile(query: Tensor, wide: int, *, adaptive: bool) -> tuple[int, int]:
    """Queries and keys of a step."""
    if capability_of(query) == INTERPRETER:
        return 16, 32
    return (128, 64) if wide <= 128 and not adaptive else (64, 64)
