"""The adaptive format agrees at every step with the uniform or the log2 format that it chose."""

import torch

from lowtide.formats import Adaptive, Affine, Grid, Log2, format_from_json, format_to_json


def test_it_is_uniform_or_log2_as_zero_says():
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    form = Adaptive(4)
    grid = form.params(torch.zeros(1), x.max()[None])
    uniform = form.decode(form.encode(x, grid), grid)
    plain = Grid(grid.scale, torch.zeros(1))
    assert torch.equal(uniform, Affine(4).decode(Affine(4).encode(x, plain), plain))
    log = form.choose(grid, x.max()[None], torch.ones(1, dtype=torch.bool))
    assert torch.allclose(log.scale, x.max()[None])
    powers = form.decode(form.encode(x, log), log)
    assert torch.equal(powers, Log2(4).decode(Log2(4).encode(x, log), log))
    assert (uniform - powers).abs().max() > 0.01


def test_each_sample_may_have_its_own_choice():
    x = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(1))
    form = Adaptive(3)
    zero = torch.tensor([0.0, 1.0]).reshape(2, 1, 1)
    grid = Grid(torch.tensor([1 / 7, 1.0]).reshape(2, 1, 1), zero)
    together = form.decode(form.encode(x, grid), grid)
    for place in range(2):
        alone = Grid(grid.scale[place], grid.zero[place])
        assert torch.equal(together[place], form.decode(form.encode(x[place], alone), alone))


def test_json():
    assert format_from_json(format_to_json(Adaptive(8))) == Adaptive(8)
