"""AdaRound's written-out gradients are those that autograd takes from the formulas themselves."""

import pytest
import torch
from torch import Tensor

from lowtide.nn.rounding import LOW, WIDTH, AdaRound, Roundings, undecided

SHARPNESS = (20.0, 11.3, 4.0, 2.0)


def spread() -> AdaRound:
    """Decisions of every kind: open, nearly made, at both ends of the stretch and beyond them."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(32, 1, generator=generator) + 0.1
    rounding = AdaRound(30 * torch.rand(32, 48, generator=generator) - 7, lambda codes: (codes.clamp(0, 15) - 6) * scale)
    with torch.no_grad():
        rounding.alpha.copy_(4 * torch.randn(32, 48, generator=generator))
        rounding.alpha[0, :3] = torch.tensor([0.0, 40.0, -40.0])
    return rounding


def gradient(rounding: AdaRound, value: Tensor) -> Tensor:
    (found,) = torch.autograd.grad(value, rounding.alpha)
    return found


def away(ours: Tensor, theirs: Tensor) -> float:
    return float(((ours - theirs).detach().double()).norm() / theirs.detach().double().norm())


def test_values_and_their_gradient_are_those_of_the_formula() -> None:
    rounding = spread()
    pull = torch.randn(32, 48, generator=torch.Generator().manual_seed(1))
    step = rounding.span / WIDTH
    plain = rounding.base - LOW * step + rounding.soft() * step
    assert away(rounding.values(), plain) < 1e-6
    assert away(gradient(rounding, (rounding.values() * pull).sum()), gradient(rounding, (plain * pull).sum())) < 1e-6


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_the_gradient_of_the_penalty_is_that_of_the_formula(sharpness: float) -> None:
    rounding = spread()
    theirs = gradient(rounding, (1 - (2 * rounding.soft() - 1).abs().pow(sharpness)).sum())
    ours = undecided(rounding.alpha.detach(), sharpness)
    assert ours.isfinite().all() and away(ours, theirs) < 1e-5


def test_roundings_side_by_side_take_the_steps_that_each_would_alone() -> None:
    pulls = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(1))
    alone, together = [spread(), spread()], [spread(), spread()]
    adams = [torch.optim.Adam(rounding.parameters(), 1e-2) for rounding in alone]
    roundings = Roundings(together)
    adam = torch.optim.Adam([roundings.alpha], 1e-2)
    for step in range(20):
        penalty = 0.01 if step >= 5 else 0.0
        roundings.start_gradient(penalty, 8.0)
        sum((rounding.values() * pull).sum() for rounding, pull in zip(together, pulls, strict=True)).backward()
        adam.step()
        for rounding, pull, each in zip(alone, pulls, adams, strict=True):
            each.zero_grad()
            lost = (1 - (2 * rounding.soft() - 1).abs().pow(8.0)).sum()
            ((rounding.values() * pull).sum() + penalty * lost).backward()
            each.step()
    for ours, theirs in zip(together, alone, strict=True):
        assert away(ours.alpha, theirs.alpha) < 1e-4
        assert away(theirs.alpha, spread().alpha) > 1e-2
    assert not roundings.settled()
    with torch.no_grad():
        roundings.alpha.fill_(9.0)
    assert roundings.settled() and all((rounding.alpha == 9).all() for rounding in together)


def test_a_weight_beyond_the_grid_has_nowhere_to_go() -> None:
    rounding = spread()
    beyond = (rounding.floor < 0) | (rounding.floor >= 15)
    assert beyond.any() and not beyond.all()
    assert ((rounding.span == 0) == beyond).all()
    assert (gradient(rounding, rounding.values().sum())[beyond] == 0).all()


def test_it_starts_where_the_weights_are() -> None:
    position = 15 * torch.rand(8, 16, generator=torch.Generator().manual_seed(2))
    rounding = AdaRound(position, lambda codes: 0.5 * codes)
    assert away(rounding.values(), 0.5 * position) < 1e-5


def test_a_warm_start_is_on_the_chosen_side_and_half_way_to_it() -> None:
    position = 15 * torch.rand(8, 16, generator=torch.Generator().manual_seed(2))
    up = torch.rand(8, 16, generator=torch.Generator().manual_seed(3)) > 0.5
    rounding = AdaRound(position, lambda codes: 0.5 * codes, up)
    assert torch.equal(rounding.hard(), up)
    assert away(rounding.values(), 0.25 * (position + position.floor() + up)) < 1e-5
