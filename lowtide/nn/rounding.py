"""AdaRound: whether each weight goes up or down, learnt through a stretched sigmoid (Nagel et al., ICML 2020).

An iteration does little with each weight, many times, so it is written out: gradient, penalty, Adam's step and the weights that
come of it are one walk, in room that was allocated before. By autograd and an optimizer, each in fresh memory, it takes a small
block as long as its own products.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

LOW, HIGH = -0.1, 1.1
WIDTH = HIGH - LOW
LEAST, MOST = -LOW / WIDTH, (1 - LOW) / WIDTH  # of the sigmoid, where soft() reaches its ends
PIECE = (
    1 << 19
)  # weights worked on at once: too few, and calls and waiting threads count; too many, and no cache holds them
SMALL = PIECE >> 2  # layers are worked on together up to here


class AdaRound(nn.Module):
    """One number per weight; soft in [0, 1] while it learns, hard when it is done.

    A module without parameters, because a layer keeps it where it keeps a LoRA.
    """

    def __init__(
        self, position: Tensor, decode: Callable[[Tensor], Tensor], up: Tensor | None = None
    ):
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
        self.alpha = torch.log(inside / (1 - inside))
        self.weight = torch.addcmul(self.base, inside, self.span).requires_grad_()

    def soft(self) -> Tensor:
        """How far each weight stands on the way up."""
        return soft(self.alpha)

    def hard(self) -> Tensor:
        """True where the weight goes up. At the start this is rounding to nearest."""
        return self.alpha >= 0

    def values(self) -> Tensor:
        """The weights as they stand: from the value below, soft() of the way to the one above."""
        return self.weight

    def take_gradient(self) -> Tensor:
        """What came to the weights since it was last taken."""
        found, self.weight.grad = self.weight.grad, None
        return (
            torch.zeros(self.weight.numel(), device=self.weight.device)
            if found is None
            else found.reshape(-1)
        )


def soft(alpha: Tensor) -> Tensor:
    return (torch.sigmoid(alpha) * WIDTH + LOW).clamp(0, 1)


@dataclass
class Lot:
    """Weights that are worked on at once, and Adam's two averages of their gradient."""

    alpha: Tensor
    base: Tensor
    span: Tensor
    weight: Tensor
    first: Tensor
    second: Tensor

    def pieces(self) -> list["Lot"]:
        """Cut evenly, for a processor; on a GPU one call does for all."""
        size = len(self.alpha)
        if self.alpha.device.type == "cpu":
            size = math.ceil(size / math.ceil(size / PIECE))
        return [
            Lot(*parts)
            for parts in zip(*(each.split(size) for each in vars(self).values()), strict=True)
        ]


class Roundings:
    """The roundings of one unit while they learn, by Adam at `rate`: small layers together, a large one in pieces."""

    def __init__(self, each: Sequence[AdaRound], rate: float):
        self.each, self.rate = each, rate
        self.device = each[0].alpha.device
        self.steps = torch.zeros((), device=self.device)
        self.groups = [(group, together(group).pieces()) for group in grouped(each)]
        largest = max(len(lot.alpha) for _, lots in self.groups for lot in lots)
        self.room = [torch.empty(largest, device=self.device) for _ in range(4)]

    @torch.no_grad()
    def step(self, penalty: float, sharpness: float) -> None:
        """Follow the loss whose gradient has come to the weights, and the penalty; the weights' gradient is forgotten."""
        self.steps.add_(1)
        for group, lots in self.groups:
            for lot, gradient in zip(lots, self.gradients(group, len(lots[0].alpha)), strict=True):
                share, gap, slope, _ = (room[: len(gradient)] for room in self.room)
                torch.sigmoid(lot.alpha, out=share)
                if penalty:
                    pull(share, penalty, sharpness, gap, out=slope).addcmul_(gradient, lot.span)
                else:
                    torch.mul(gradient, lot.span, out=slope)
                torch.ops.aten.hardtanh_backward.grad_input(
                    slope, share, LEAST, MOST, grad_input=slope
                )
                torch.ops.aten.sigmoid_backward.grad_input(slope, share, grad_input=slope)
                adam(lot, slope, self.steps, self.rate)
                torch.sigmoid(lot.alpha, out=share).clamp_(LEAST, MOST)
                torch.addcmul(lot.base, share, lot.span, out=lot.weight)

    def gradients(self, group: Sequence[AdaRound], size: int) -> Sequence[Tensor]:
        """Of each of the group's lots."""
        found = [rounding.take_gradient() for rounding in group]
        return (
            found[0].split(size)
            if len(found) == 1
            else [torch.cat(found, out=self.room[-1][:size])]
        )

    def settled(self) -> bool:
        """Every weight has made up its mind, or nearly so."""
        return all(bool(((rounding.soft() - 0.5).abs() > 0.45).all()) for rounding in self.each)


def grouped(each: Sequence[AdaRound]) -> Iterator[list[AdaRound]]:
    """Neighbours that are small together, or one alone."""
    group: list[AdaRound] = []
    for rounding in each:
        if group and sum(member.alpha.numel() for member in (*group, rounding)) > SMALL:
            yield group
            group = []
        group.append(rounding)
    yield group


@torch.no_grad()
def together(group: Sequence[AdaRound]) -> Lot:
    """What these have, side by side; each sees its own part of it from now on."""
    sizes, found = [rounding.alpha.numel() for rounding in group], {}
    for name in ("alpha", "base", "span", "weight"):
        found[name] = torch.cat([getattr(rounding, name).reshape(-1) for rounding in group])
        for rounding, part in zip(group, found[name].split(sizes), strict=True):
            setattr(rounding, name, part.view(rounding.alpha.shape))
    for rounding in group:
        rounding.weight.requires_grad_()
    return Lot(
        **found, first=torch.zeros_like(found["alpha"]), second=torch.zeros_like(found["alpha"])
    )


def pull(share: Tensor, penalty: float, sharpness: float, gap: Tensor, out: Tensor) -> Tensor:
    """The gradient, by the sigmoid, of AdaRound's penalty: the sum of 1 - |u|^b, where u = 2 soft - 1 = 2 WIDTH (sigmoid - 1/2).

    With d = 1/2 - sigmoid it is b (2 WIDTH)^b d |d|^(b-2).
    """
    torch.sub(0.5, share, out=gap)
    # |d|^(b-2) by way of the logarithm of d^2, for pow takes four times as long, and so do numbers that are all but zero.
    strength = math.log(penalty * sharpness) + sharpness * math.log(2 * WIDTH)
    torch.mul(gap, gap, out=out).log_()
    torch.add(strength, out, alpha=max(sharpness / 2 - 1, 1e-6), out=out).clamp_(min=-60)
    return out.exp_().mul_(gap)


def adam(lot: Lot, gradient: Tensor, steps: Tensor, rate: float) -> None:
    """A step of torch.optim.Adam(fused=True) without what it does around it, which takes longer than a small layer does."""
    state = [[each] for each in (lot.alpha, gradient, lot.first, lot.second)]
    fixed = {
        "beta1": 0.9,
        "beta2": 0.999,
        "weight_decay": 0.0,
        "eps": 1e-8,
        "amsgrad": False,
        "maximize": False,
    }
    torch._fused_adam_(*state, [], [steps], lr=rate, **fixed)
