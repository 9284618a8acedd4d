"""AdaRound: whether each weight goes up or down, learnt through a stretched sigmoid (Nagel et al., ICML 2020).

An iteration reads each weight many times and little else, so both gradients are written out: as autograd takes them, step by
step, they cost a small block more than its own products do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LOW, HIGH = -0.1, 1.1
WIDTH = HIGH - LOW
LEAST, MOST = -LOW / WIDTH, (1 - LOW) / WIDTH  # where soft() reaches its ends
PIECE = 1 << 17  # weights whose penalty is worked out at once: what that takes stays in a cache


class AdaRound(nn.Module):
    """One number per weight; soft in [0, 1] while it learns, hard when it is done."""

    def __init__(self, position: Tensor, decode: Callable[[Tensor], Tensor], up: Tensor | None = None):
        """`position`: each weight in units of its step; soft() starts at its fraction, so nothing moves at first.

        `decode` makes weights of codes. With `up`, decisions made before, soft() starts half-way from there to these: a warm
        start, on the side that was chosen and near enough to the other to change it.
        """
        super().__init__()
        self.floor = position.floor()
        below = decode(self.floor)
        step = decode(self.floor + 1) - below
        # A value is below + soft() step, which is base + span times the sigmoid, kept within LEAST and MOST.
        self.base, self.span = below + LOW * step, WIDTH * step
        start = position - self.floor
        if up is not None:
            start = (start + up) / 2
        inside = (start - LOW) / WIDTH
        self.alpha = nn.Parameter(torch.log(inside / (1 - inside)))

    def soft(self) -> Tensor:
        return soft(self.alpha)

    def hard(self) -> Tensor:
        """True where the weight goes up. At the start this is rounding to nearest."""
        return self.alpha >= 0

    def values(self) -> Tensor:
        """The weights as they stand: from the value below, soft() of the way to the one above."""
        return Between.apply(self.alpha, self.base, self.span)


def soft(alpha: Tensor) -> Tensor:
    """How far each weight stands on the way up."""
    return (torch.sigmoid(alpha) * WIDTH + LOW).clamp(0, 1)


class Between(torch.autograd.Function):
    """base + span sigmoid(alpha), the sigmoid kept within LEAST and MOST."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, base: Tensor, span: Tensor) -> Tensor:
        share = torch.sigmoid(alpha)
        ctx.save_for_backward(share, span)
        return torch.addcmul(base, share.clamp(LEAST, MOST), span)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        share, span = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(gradient * span, share, LEAST, MOST)
        return torch.ops.aten.sigmoid_backward(inside, share), None, None


class Roundings:
    """The roundings of one unit as a single parameter, so that the penalty and Adam, which read nothing else, are one call each.

    Each rounding keeps its place in it and in its gradient, as a view.
    """

    def __init__(self, each: Sequence[AdaRound]):
        self.alpha = nn.Parameter(torch.cat([rounding.alpha.detach().flatten() for rounding in each]))
        self.alpha.grad = torch.zeros_like(self.alpha)
        sizes = [rounding.alpha.numel() for rounding in each]
        for rounding, part, slope in zip(each, self.alpha.detach().split(sizes), self.alpha.grad.split(sizes), strict=True):
            shape = rounding.alpha.shape
            rounding.alpha = nn.Parameter(part.view(shape))
            rounding.alpha.grad = slope.view(shape)

    def start_gradient(self, penalty: float, sharpness: float) -> None:
        """What was there is forgotten; the gradient begins as that of the penalty, and a loss adds its own to it."""
        if not penalty:
            self.alpha.grad.zero_()
            return
        for alpha, slope in zip(self.alpha.detach().split(PIECE), self.alpha.grad.split(PIECE), strict=True):
            torch.mul(undecided(alpha, sharpness), penalty, out=slope)

    def settled(self) -> bool:
        """Every weight has made up its mind, or nearly so."""
        return bool(((soft(self.alpha) - 0.5).abs() > 0.45).all())


def undecided(alpha: Tensor, sharpness: float) -> Tensor:
    """The gradient of AdaRound's penalty: the sum of 1 - |u|^b where u = 2 soft(alpha) - 1, zero once every weight is decided.

    d/dalpha = -b u |u|^(b-2) du/dalpha, and du/dalpha = (WIDTH^2 - u^2) / (2 WIDTH), or 0 where soft() is at an end.
    """
    stretched = torch.sigmoid(alpha).mul_(2 * WIDTH).sub_(WIDTH)
    u = stretched.clamp(-1, 1)
    square = u.square().add_(1e-30)  # so that there is a logarithm
    power = square.log2().mul_(sharpness / 2 - 1).exp2_()  # |u|^(b-2); pow takes four times as long
    slope = u.mul_(power).mul_(square.sub_(WIDTH**2)).mul_(sharpness / (2 * WIDTH))
    return torch.ops.aten.hardtanh_backward(slope, stretched, -1, 1)
