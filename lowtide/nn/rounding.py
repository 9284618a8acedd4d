"""AdaRound: whether each weight goes up or down, learnt through a stretched sigmoid (Nagel et al., ICML 2020).

An iteration reads each weight many times and little else, so both gradients are written out: as autograd takes them, step by
step, they cost a small block more than its own products do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOW, HIGH = -0.1, 1.1
WIDTH = HIGH - LOW


class AdaRound(nn.Module):
    """One number per weight; soft in [0, 1] while it learns, hard when it is done."""

    def __init__(self, position: Tensor, decode: Callable[[Tensor], Tensor], up: Tensor | None = None):
        """`position`: each weight in units of its step; soft() starts at its fraction, so nothing moves at first.

        `decode` makes weights of codes. With `up`, decisions made before, soft() starts half-way from there to these: a warm
        start, on the side that was chosen and near enough to the other to change it.
        """
        super().__init__()
        self.floor = position.floor()
        self.below = decode(self.floor)
        self.step = decode(self.floor + 1) - self.below
        start = position - self.floor
        if up is not None:
            start = (start + up) / 2
        inside = (start - LOW) / WIDTH
        self.alpha = nn.Parameter(torch.log(inside / (1 - inside)))

    def soft(self) -> Tensor:
        return (torch.sigmoid(self.alpha) * WIDTH + LOW).clamp(0, 1)

    def hard(self) -> Tensor:
        """True where the weight goes up. At the start this is rounding to nearest."""
        return self.alpha >= 0

    def values(self) -> Tensor:
        """The weights as they stand: from the value below, soft() of the way to the one above."""
        return Between.apply(self.alpha, self.below, self.step)

    def penalty(self, sharpness: float) -> Tensor:
        """Sum of 1 - |2 soft() - 1|^b: zero when every weight has made up its mind."""
        return Undecided.apply(self.alpha, sharpness)


class Between(torch.autograd.Function):
    """below + soft(alpha) step."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, below: Tensor, step: Tensor) -> Tensor:
        share = torch.sigmoid(alpha)
        ctx.save_for_backward(share, step)
        return (share * WIDTH).add_(LOW).clamp_(0, 1).mul_(step).add_(below)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        share, step = ctx.saved_tensors
        stretched = (gradient * step).mul_(WIDTH)
        stretched = torch.ops.aten.hardtanh_backward(stretched, share, -LOW / WIDTH, (1 - LOW) / WIDTH)
        return torch.ops.aten.sigmoid_backward(stretched, share), None, None


class Undecided(torch.autograd.Function):
    """Sum of 1 - |u|^b where u = 2 soft(alpha) - 1; its slope is at hand once the value is, so it is what is kept."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, sharpness: float) -> Tensor:
        stretched = torch.sigmoid(alpha).mul_(2 * WIDTH).sub_(WIDTH)
        u = stretched.clamp(-1, 1)
        square = u.square().add_(1e-30)  # so that there is a logarithm
        power = square.log2().mul_(sharpness / 2 - 1).exp2_()  # |u|^(b-2); pow takes four times as long
        lost = torch.dot(power.flatten(), square.flatten())
        # d/dalpha = -b u |u|^(b-2) du/dalpha, and du/dalpha = (WIDTH^2 - u^2) / (2 WIDTH), or 0 where soft() is at an end.
        slope = u.mul_(power).mul_(square.sub_(WIDTH**2)).mul_(sharpness / (2 * WIDTH))
        ctx.save_for_backward(torch.ops.aten.hardtanh_backward(slope, stretched, -1, 1))
        return alpha.numel() - lost

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * gradient, None
