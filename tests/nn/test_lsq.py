"""Rounding with gradients: values as of the format, gradients as of plain straight-through code."""

import pytest
import torch

from lowtide.formats import Affine, Mixed
from lowtide.nn.lsq import lsq_round


def spelled_out(x, scale, zero, top):
    place = x / scale + zero
    nearest = place.detach().round()
    inside = (nearest >= 0) & (nearest <= top)
    codes = nearest.clamp(min=0).minimum(top) + (place - place.detach()) * inside
    return (codes - zero) * scale


@pytest.mark.parametrize(
    "form",
    [Affine(3, axis=0), Affine(4, signed=True, axis=0), Mixed((1, 2, 3, 4, 5), signed=False)],
    ids=str,
)
def test_values_and_gradients(form):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 40, generator=generator)
    # Some of x is outside this range.
    grid = form.params(-torch.ones(5, 1), torch.linspace(0.5, 2, 5)[:, None])
    top = form.levels(x) - 1 if isinstance(form, Mixed) else torch.tensor(float(form.top))
    weights = torch.randn(5, 40, generator=generator)
    results = []
    for function in (lsq_round, spelled_out):
        leaves = (x.clone().requires_grad_(), grid.scale.clone().requires_grad_())
        values = function(*leaves, grid.zero, top)
        (values * weights).sum().backward()
        results.append((values.detach(), *(leaf.grad for leaf in leaves)))
    (ours, to_x, to_scale), (theirs, x_expected, scale_expected) = results
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, form.decode(form.encode(x, grid), grid))
    assert torch.allclose(to_x, x_expected, atol=1e-6)
    assert 0 < (to_x == 0).sum() < x.numel()
    assert ((to_scale - scale_expected).norm() / scale_expected.norm()).item() < 1e-5


def test_one_scale_for_all_and_one_for_each_sample():
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    for shape in ((), (3, 1, 1)):
        scale = torch.full(shape, 0.1).requires_grad_()
        lsq_round(x, scale, torch.tensor(8.0), 15).square().sum().backward()
        assert scale.grad.shape == shape
        assert (scale.grad != 0).all()
