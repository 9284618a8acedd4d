"""Operators on packed layers: what they mean, in plain torch, and where faster twins register."""

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
