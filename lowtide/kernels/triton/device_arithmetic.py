"""Arithmetic that the Triton kernels share: rounding to a grid, the running step, activations."""

# The kernels are written in Triton's language, which only looks like Python to a type checker.
# pyright: reportMissingImports=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false
# pyright: reportOperatorIssue=false, reportCallIssue=false

import triton
import triton.language as tl

# The numbers of native_library's activations.
IDENTITY = tl.constexpr(0)
SILU = tl.constexpr(1)
GELU_TANH = tl.constexpr(2)
GELU_ERF = tl.constexpr(3)
# 1.5 * 2^23: a float32 of this size has no fraction, so adding it rounds to the nearest integer.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def step_grid(scale, zero, index, row, rows_per_step, ONE_STEP: tl.constexpr):
    """The scale and zero point of all rows, or of each (rows, 1), at the running step.

    `index` holds one step for all rows, or one for each `rows_per_step` rows. It stays on the
    device, so a captured CUDA graph reads the step of its replay.
    """
    step = tl.load(index) if ONE_STEP else tl.load(index + row // rows_per_step)[:, None]
    return tl.load(scale + step), tl.load(zero + step).to(tl.float32)


@triton.jit
def nearest(x):
    """The nearest integer, ties to even. x lies within 2^22."""
    return (x + MAGIC) - MAGIC


@triton.jit
def encode(x, scale, zero, top):
    """The codes of float32 values, less 128, as float32; the rounding of quantize_input.

    A value that is not a number gets some code: its row of sums says that it was there.
    """
    steps = tl.div_rn(x, scale + tl.zeros_like(x))
    inside = tl.minimum(tl.maximum(steps, 0.0 - zero), top - zero)
    return nearest(inside) + (zero - 128.0)


@triton.jit
def encode_product(x, inverse, zero, top):
    """The codes of a product, times 1 / scale; NaN where x is not a number.

    A product has its own last digit in float32, so no exact division is needed.
    """
    inside = tl.minimum(tl.maximum(x * inverse, 0.0 - zero), top - zero)
    return tl.where(x != x, x, nearest(inside) + (zero - 128.0))


@triton.jit
def not_a_number(x):
    """NaN where x is not a number, and 0 everywhere else, also where x is infinite."""
    return tl.where(x != x, x, 0.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == SILU:
        x = x * tl.sigmoid(x)
    elif ACTIVATION == GELU_TANH:
        # tanh(u) is 2 * sigmoid(2 u) - 1.
        inner = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        x = x * tl.sigmoid(inner)
    elif ACTIVATION == GELU_ERF:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x
