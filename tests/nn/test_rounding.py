"""AdaRound's written-out gradients are those that autograd takes from the formulas themselves."""

import pytest
import torch
from torch import Tensor

from lowtide.nn.rounding import AdaRound

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
    plain = rounding.below + rounding.soft() * rounding.step
    assert away(rounding.values(), plain) < 1e-6
    assert away(gradient(rounding, (rounding.values() * pull).sum()), gradient(rounding, (plain * pull).sum())) < 1e-6


@pytest.mark.parametrize("sharpness", SHARPNESS)
def test_penalty_and_its_gradient_are_those_of_the_formula(sharpness: float) -> None:
    rounding = spread()
    plain = (1 - (2 * rounding.soft() - 1).abs().pow(sharpness)).sum()
    assert float(rounding.penalty(sharpness)) == pytest.approx(float(plain), rel=1e-5)
    ours, theirs = gradient(rounding, 0.3 * rounding.penalty(sharpness)), gradient(rounding, 0.3 * plain)
    assert ours.isfinite().all() and away(ours, theirs) < 1e-5


def test_a_weight_beyond_the_grid_has_nowhere_to_go() -> None:
    rounding = spread()
    beyond = (rounding.floor < 0) | (rounding.floor >= 15)
    assert beyond.any() and not beyond.all()
    assert ((rounding.step == 0) == beyond).all()
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
