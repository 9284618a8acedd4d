"""The two operators of a traced denoiser that a converter writes in its own form.

Everything else in the graph is plain torch. The functions here say what the two compute.
"""

import torch
from torch import Tensor

from lowtide.kernels import quantize_input

NAMESPACE = "lowtide"
ROUND = "rounded_input"
STORED = "stored_weight"


@torch.library.custom_op(f"{NAMESPACE}::{ROUND}", mutates_args=())
def rounded_input(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The input on its grid, whose last code is `top`; scale and zero are of the running step."""
    return quantize_input(x, scale, zero, top)


@rounded_input.register_fake
def _(x: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f"{NAMESPACE}::{STORED}", mutates_args=())
def stored_weight(reader: Tensor, codes: Tensor, zero: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The values that codes stand for, in float32: (codes - zero) * scale.

    The codes are int8 or uint8, each with `bits` bits in the file: 4 or 8. Zero has their type.
    `reader` is any input of the layer: an operator on constants alone is computed by the converter.
    """
    return (codes.float() - zero.float()) * scale


@stored_weight.register_fake
def _(reader: Tensor, codes: Tensor, zero: Tensor, scale: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape, dtype=torch.float32)
