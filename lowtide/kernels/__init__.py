"""Operators on packed layers: what they mean, in plain torch, and where faster twins register."""

from lowtide.kernels.ops import Spec, conv2d, linear, quantize_input, unpack_weight

__all__ = ["Spec", "conv2d", "linear", "quantize_input", "unpack_weight"]
