"""AdaRound's written-out steps equal those of autograd and torch's Adam on the formulas."""

import pytest
import torch
from torch import Tensor

from lowtide.nn import rounding as module
from lowtide.nn.rounding import LOW, WIDTH, AdaRound, RoundingOptimizer, penalty_gradient

SHARPNESS = (20.0, 11.3, 4.0, 2.0)


def positions(generator: torch.Generator, rows: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and weights in units of them, of which some are outside of the grid's 16 codes."""
    scale = torch.rand(rows, 1, generator=generator) + 0.1
    return scale, 30 * torch.rand(rows, 48, generator=generator) - 7


def spread(rows: int = 32) -> AdaRound:
    """Decisions of every kind: open, nearly made, at both ends of soft() and beyond them."""
    generator = torch.Generator().manual_seed(rows)
    scale, position = positions(generator, rows)
    rounding = AdaRound(position, lambda codes: (codes.clamp(0, 15) - 6) * scale)
    rounding.alpha.copy_(4 * torch.randn(rows, 48, generator=generator))
    rounding.alpha[0, :3] = torch.tensor([0.0, 40.0, -40.0])
    return rounding


class Twin:
    """The same rounding by the formulas, with gradients of autograd and steps of torch's Adam."""

    def __init__(self, of: AdaRound, rate: float):
        self.alpha = torch.nn.Parameter(of.alpha.clone())
        self.step = of.span.clone() / WIDTH
        self.below = of.base.clone() - LOW * self.step
        self.adam = torch.optim.Adam([self.alpha], rate)

    def soft(self) -> Tensor:
        return (torch.sigmoid(self.alpha) * WIDTH + LOW).clamp(0, 1)

    def values(self) -> Tensor:
        return self.below + self.soft() * self.step

    def penalty(self, sharpness: float) -> Tensor:
        return (1 - (2 * self.soft() - 1).abs().pow(sharpness)).sum()

    def follow(self, loss: Tensor) -> None:
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()


def distance(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).detach().double()).norm() / theirs.detach().double().norm())


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_the_gradient_of_the_penalty_is_that_of_autograd(sharpness: float) -> None:
    rounding = spread()
    twin = Twin(rounding, 1e-2)
    sigmoid = torch.sigmoid(rounding.alpha)
    (theirs,) = torch.autograd.grad(0.01 * twin.penalty(sharpness), twin.alpha)
    inside = (rounding.soft() > 0) & (rounding.soft() < 1)
    gap = torch.empty_like(sigmoid)
    gradient = penalty_gradient(sigmoid, 0.01, sharpness, gap=gap, out=torch.empty_like(sigmoid))
    ours = gradient * sigmoid * (1 - sigmoid) * inside
    assert ours.isfinite().all() and distance(ours, theirs) < 1e-5


@pytest.mark.parametrize("chunk", [module.CHUNK, 1900], ids=["whole", "in pieces"])
@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_steps_are_those_of_the_formulas(
    sharpness: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that are updated together or in pieces are updated as each would be alone."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    monkeypatch.setattr(module, "SMALL", 1900)
    each = [spread(rows) for rows in (32, 7, 100, 16)]
    twins = [Twin(rounding, 1e-2) for rounding in each]
    starts = [rounding.alpha.clone() for rounding in each]
    roundings = RoundingOptimizer(each, 1e-2)
    assert [len(group) for group, _ in roundings.groups] == [2, 1, 1]
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        penalty = 0.01 if step >= 5 else 0.0
        pulls = [torch.randn(rounding.alpha.shape, generator=generator) for rounding in each]
        pairs = zip(each, pulls, strict=True)
        losses = [(rounding.values() * pull).sum() for rounding, pull in pairs]
        sum(losses).backward()
        roundings.step(penalty, sharpness)
        for twin, pull in zip(twins, pulls, strict=True):
            twin.follow((twin.values() * pull).sum() + penalty * twin.penalty(sharpness))
    for rounding, twin, start in zip(each, twins, starts, strict=True):
        assert distance(rounding.alpha, twin.alpha) < 1e-4 and distance(start, twin.alpha) > 1e-2
        assert distance(rounding.values(), twin.values()) < 1e-5
        assert torch.equal(rounding.hard(), twin.alpha >= 0)
        assert rounding.values().is_leaf and rounding.values().grad is None


def test_values_are_those_of_the_formula() -> None:
    """A step at rate 0 keeps the decisions and computes the weights."""
    rounding = spread()
    twin = Twin(rounding, 1e-2)
    alpha = rounding.alpha.clone()
    RoundingOptimizer([rounding], 0.0).step(0.0, 8.0)
    assert torch.equal(rounding.alpha, alpha)
    assert distance(rounding.values(), twin.values()) < 1e-6


def test_a_layer_that_took_no_part_follows_the_penalty_alone() -> None:
    rounding = spread()
    twin = Twin(rounding, 1e-2)
    RoundingOptimizer([rounding], 1e-2).step(0.01, 8.0)
    twin.follow(0.01 * twin.penalty(8.0))
    assert distance(rounding.alpha, twin.alpha) < 1e-5


def test_roundings_are_settled_once_every_weight_is() -> None:
    each = [spread(), spread(7)]
    roundings = RoundingOptimizer(each, 1e-2)
    assert not roundings.settled()
    for rounding in each:
        rounding.alpha.fill_(9.0)
    assert roundings.settled()
    each[1].alpha[3, 5] = 0.1
    assert not roundings.settled()


def test_a_weight_outside_the_grid_does_not_move() -> None:
    rounding = spread()
    floor = positions(torch.Generator().manual_seed(32))[1].floor()
    beyond = (floor < 0) | (floor >= 15)
    assert beyond.any() and not beyond.all()
    assert ((rounding.span == 0) == beyond).all()
    roundings = RoundingOptimizer([rounding], 1.0)
    before = rounding.values().detach().clone()
    rounding.values().sum().backward()
    roundings.step(0.0, 8.0)
    assert torch.equal(rounding.values()[beyond], before[beyond])
    assert not torch.equal(rounding.values(), before)


def test_it_starts_where_the_weights_are() -> None:
    position = 15 * torch.rand(8, 16, generator=torch.Generator().manual_seed(2))
    rounding = AdaRound(position, lambda codes: 0.5 * codes)
    assert distance(rounding.values(), 0.5 * position) < 1e-5


def test_a_warm_start_is_on_the_chosen_side_and_half_way_to_it() -> None:
    position = 15 * torch.rand(8, 16, generator=torch.Generator().manual_seed(2))
    up = torch.rand(8, 16, generator=torch.Generator().manual_seed(3)) > 0.5
    rounding = AdaRound(position, lambda codes: 0.5 * codes, up)
    assert torch.equal(rounding.hard(), up)
    assert distance(rounding.values(), 0.25 * (position + position.floor() + up)) < 1e-5
