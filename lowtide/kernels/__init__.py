"""Operators on packed layers: their reference in plain torch, and where faster kernels register."""

from lowtide.kernels.ops import (
    Spec,
    conv2d,
    divide,
    linear,
    per_sample,
    quantize_input,
    unpack_codes,
    unpack_weight,
    zero_point,
)

__all__ = [
    "Spec",
    "conv2d",
    "divide",
    "linear",
    "per_sample",
    "quantize_input",
    "unpack_codes",
    "unpack_weight",
    "zero_point",
]
