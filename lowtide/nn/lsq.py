"""Rounding with gradients: straight through the rounding to its input, and to the grid's scale.

The gradient of the scale is that of LSQ (Esser et al., ICLR 2020): the rounding error where a value
is inside the grid, the last code where a value is outside. It is one function because autograd's
own record of these operations costs as much as a convolution.
"""

from typing import Protocol

import torch
from torch import Tensor


class _Context(Protocol):
    """What autograd passes to both functions; it carries values from the first to the second."""

    shape: torch.Size
    saved_tensors: tuple[Tensor, Tensor]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class LSQRound(torch.autograd.Function):
    """`scale`, `zero` and `top`, the last code, broadcast against x."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
        position = x / scale
        nearest = (position + zero).round_()
        codes = nearest.clamp(min=0).minimum(top)
        outside = nearest != codes
        levels = codes.sub_(zero)
        ctx.save_for_backward(outside, levels - position.masked_fill_(outside, 0))
        ctx.shape = scale.shape
        return levels * scale

    @staticmethod
    def backward(ctx: _Context, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,) = grad_outputs
        outside, slope = ctx.saved_tensors
        scale_gradient = (gradient * slope).sum_to_size(ctx.shape)
        return gradient.masked_fill(outside, 0), scale_gradient, None, None


def lsq_round(x: Tensor, scale: Tensor, zero: Tensor, top: float | Tensor) -> Tensor:
    """x on the grid, with a gradient for x and for scale."""
    last = torch.as_tensor(top, device=x.device, dtype=torch.float32)
    return LSQRound.apply(x, scale, zero, last)
