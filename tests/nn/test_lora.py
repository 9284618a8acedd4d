"""LoRA: it starts at nearest, learns through the rounding, and merges exactly into the codes."""

import pytest
import torch
from torch import nn

from lowtide.formats import Affine, Mixed, mse
from lowtide.nn.clock import Clock
from lowtide.nn.lora import LoRA, WeightGrid
from lowtide.nn.packed import packed_twin
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer

FORMATS = [
    Affine(2, axis=0),
    Affine(4, axis=0),
    Affine(8, signed=True, axis=0),
    Mixed((1, 2, 3) * 4, signed=False),
]
LAYERS = {
    "linear": (lambda: nn.Linear(40, 12), (16, 40)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 8, 6, 6)),
}


def built(kind: str, form):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = quantized_layer(make().requires_grad_(False), form, Quantizer(None, Clock((0,))))
    weight = layer.smoothed_weight()
    layer.set_grid(form.params(*mse(form.rows(weight), form), len(weight)))
    return layer, torch.randn(shape)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_it_starts_at_codes_chosen_before(form):
    layer, x = built("conv", form)
    shifted = layer.codes.float() + torch.randint(-1, 2, layer.codes.shape)
    shifted = shifted.clamp(min=0).minimum(layer.top(layer.codes))
    layer.set_codes(shifted.to(torch.uint8))
    chosen = layer(x)
    lora = layer.start_lora(4, generator())
    assert (layer(x) - chosen).norm() / chosen.norm() < 1e-6
    change = (lora.weight - layer.weight.flatten(1)).abs()
    assert (change <= 1.5 * layer.grid.scale).float().mean() > 0.8


def test_groups_merge_exactly_up_to_the_order_of_products():
    layer, x = built("linear", Affine(3, signed=True, axis=0, group=8))
    layer.start_lora(4, generator())
    learnt = layer(x).detach()
    layer.finish_lora()
    assert (layer(x) - learnt).norm() / learnt.norm() < 1e-6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_it_starts_at_nearest_and_merges_to_what_it_used(kind, form):
    layer, x = built(kind, form)
    nearest = layer(x)
    lora = layer.start_lora(4, generator())
    assert (layer(x) - nearest).norm() / nearest.norm() < 1e-6
    with torch.no_grad():
        lora.up.normal_(0, 0.02)
        lora.log_scale.add_(0.05)
    learnt = layer(x)
    assert (learnt - nearest).norm() / nearest.norm() > 1e-3
    layer.finish_lora()
    assert torch.equal(layer(x), learnt)
    assert torch.equal(packed_twin(layer)(x), learnt)
    assert not any("rounding" in name or "lora" in name for name in layer.state_dict())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_learning_beats_nearest(form):
    layer, x = built("conv", form)
    # Like most inputs of a network, they have a mean, which the rounding can learn to reproduce.
    x = x.clamp(min=0)
    target = nn.functional.conv2d(x, layer.weight, layer.bias, padding=1)
    before = (layer(x) - target).square().mean().item()
    lora = layer.start_lora(8, generator())
    optimizer = torch.optim.Adam([lora.down, lora.up], layer.grid.scale.mean().item() / 20)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 100)
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    layer.finish_lora()
    assert (layer(x) - target).square().mean().item() / before < 0.8


def test_the_gradient_goes_straight_through_and_stops_beyond_the_last_code():
    layer, _ = built("linear", Affine(2, signed=True, axis=0))
    lora = layer.start_lora(4, generator())
    with torch.no_grad():
        lora.log_scale.sub_(2.0)
    moved = lora.moved().detach()
    place = (moved / lora.grid().scale + lora.weight_grid.grid.zero).round()
    inside = (place >= 0) & (place <= 3)
    assert 0.05 < inside.float().mean() < 0.95
    lora.values().sum().backward()
    assert torch.allclose(lora.up.grad, inside.float() @ lora.down.detach().T, atol=1e-5)


def test_its_step_is_that_of_the_grid_with_groups_too():
    for form in (Affine(3, signed=True, axis=0), Affine(3, signed=True, axis=0, group=16)):
        weight = torch.randn(8, 64, generator=generator())
        grid = form.params(*mse(form.rows(weight), form), len(weight))
        lora = LoRA(weight, WeightGrid(form, grid, torch.tensor(7.0)), 4, generator())
        apart = form.decode(form.encode(weight, grid) + 1, grid) - form.decode(
            form.encode(weight, grid), grid
        )
        assert lora.step() == pytest.approx(apart.mean().item(), rel=1e-4)


def test_rank_is_at_most_that_of_the_weight():
    layer, _ = built("linear", Affine(4, axis=0))
    lora = layer.start_lora(32, generator())
    assert lora.down.shape == (12, 40)
    assert lora.up.shape == (12, 12)


def test_two_level_channels_of_a_mixed_weight_are_plus_and_minus():
    form = Mixed((1, 2, 8), signed=False)
    x = torch.randn(3, 50, generator=generator()) + 0.5
    grid = form.params(*mse(form.rows(x), form))
    stored = grid._replace(zero=grid.zero.to(torch.uint8).float())
    values = form.decode(form.encode(x, grid), stored)
    assert torch.equal(values[0].abs(), values[0].abs()[:1].expand(50))
    assert len(values[0].unique()) == 2
    assert grid.zero[2] == 128
    assert (values[2] - x[2]).norm() / x[2].norm() < 0.01
