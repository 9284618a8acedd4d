"""Operators on packed layers: their reference in plain torch, and where faster kernels register."""

from lowtide.kernels.ops import (
    Spec,
    conv2d,
    divide,
    linear,
    per_sample,
    quantize_input,
    unpack_weight,
)

__all__ = ["Spec", "conv2d", "divide", "linear", "per_sample", "quantize_input", "unpack_weight"]
