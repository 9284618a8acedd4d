"""Rounding that learns: values on a grid, the gradient passed straight through to what is rounded and to the grid's scale.

The scale's gradient is LSQ's (Esser et al., ICLR 2020): what rounding added where a value lies on the grid, the last code where
it lies beyond. Written as one function because autograd's own record of it costs as much as a convolution.
"""

from typing import Any

import torch
from torch import Tensor


class LSQRound(torch.autograd.Function):
    """`scale`, `zero` and `top`, the last code, broadcast against x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, top: Tensor) -> Tensor:
        place = x / scale
        nearest = (place + zero).round_()
        codes = nearest.clamp(min=0).minimum(top)
        outside = nearest != codes
        levels = codes.sub_(zero)
        ctx.save_for_backward(outside, levels - place.masked_fill_(outside, 0))
        ctx.shape = scale.shape
        return levels * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        outside, slope = ctx.saved_tensors
        return (
            gradient.masked_fill(outside, 0),
            (gradient * slope).sum_to_size(ctx.shape),
            None,
            None,
        )


def lsq_round(x: Tensor, scale: Tensor, zero: Tensor, top: float | Tensor) -> Tensor:
    """x on the grid, with a gradient for x and for scale."""
    return LSQRound.apply(
        x, scale, zero, torch.as_tensor(top, device=x.device, dtype=torch.float32)
    )
