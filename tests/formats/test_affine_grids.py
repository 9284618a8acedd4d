"""Grids: scales, zero points and factors of known ranges, by hand and from plain loops."""

import numpy as np
import pytest
import torch

from lowtide.formats import Adaptive, Affine, Grid, Log2, Mixed

SMALLEST = 2.0**-149  # the smallest float32 above zero


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values)[:, None]


@pytest.mark.parametrize(
    ("bits", "lo", "hi", "scale", "zero"),
    [
        (4, -1.0, 2.0, 0.2, 5),
        (4, 0.5, 3.0, 0.2, 0),  # a range above zero reaches down to zero
        (4, -3.0, -0.5, 0.2, 15),  # and one below zero reaches up to zero
        (2, 0.0, 3.0, 1.0, 0),
        (1, 0.0, 3.0, 3.0, 0),
        (8, -1.0, 1.55, 0.01, 100),
        (4, 0.0, 0.0, 1.0, 0),
        (4, -22 * SMALLEST, 0.0, SMALLEST, 15),  # the zero point stays a code
    ],
)
def test_an_unsigned_grid_covers_the_range_and_zero(bits, lo, hi, scale, zero):
    grid = Affine(bits).params(torch.tensor(lo), torch.tensor(hi))
    assert grid.scale.item() == pytest.approx(scale, rel=1e-6, abs=0)
    assert grid.zero.item() == zero


@pytest.mark.parametrize(
    ("bits", "lo", "hi", "scale", "zero"),
    [
        (1, -1.0, 3.0, 6.0, 0.5),
        (1, -5.0, 3.0, 10.0, 0.5),
        (2, -1.0, 3.0, 3.0, 2),
        (2, -6.0, 2.0, 3.0, 2),
        (3, -1.0, 3.0, 1.0, 4),
        (3, -4.0, 1.0, 1.0, 4),
        (4, 0.5, 1.4, 0.2, 8),
        (8, -1.0, 1.27, 0.01, 128),
        (8, -2.56, 1.27, 0.02, 128),
        (3, 0.0, 0.0, 1.0, 4),
    ],
)
def test_a_signed_grid_has_the_middle_code_for_zero(bits, lo, hi, scale, zero):
    for form in (Affine(bits, signed=True, axis=0), Mixed((bits,))):
        grid = form.params(column(lo), column(hi))
        assert grid.scale.item() == pytest.approx(scale, rel=1e-6)
        assert grid.zero.item() == zero


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_factors_of_groups_are_rounded_from_the_largest_scale_of_each_channel(bits):
    draw = torch.Generator().manual_seed(bits)
    spread = torch.tensor([1.0, 0.2, 0.02, 5.0]).repeat(3)[:, None]
    x = torch.randn(12, 8, generator=draw) * spread
    form = Affine(bits, signed=True, axis=0, group=8)
    grid = form.params(x.amin(1, keepdim=True), x.amax(1, keepdim=True), channels=3)
    half = 2 ** (bits - 1)
    scales = np.maximum(-x.numpy().min(1) / half, x.numpy().max(1) / max(1, half - 1)).reshape(3, 4)
    top = {2: 15, 4: 15, 6: 3, 8: 1}[bits]
    for channel in range(3):
        unit = scales[channel].max() / top
        assert grid.scale[channel].item() == pytest.approx(unit, rel=1e-6)
        assert grid.factor[channel].max() == top
        for group in range(4):
            factor = min(max(round(scales[channel, group] / unit), 1), top)
            assert grid.factor[channel, group] == factor
    assert grid.zero.tolist() == [[half]] * 3


def test_a_group_has_its_own_columns():
    """Five columns in groups of two: the last group is padded, and the padding falls off again."""
    form = Affine(4, signed=True, axis=0, group=2)
    x = torch.tensor([[7.0, 0, 1, 0, 3], [14, 14, 2, 2, 0]])
    assert form.rows(x).tolist() == [[7, 0], [1, 0], [3, 0], [14, 14], [2, 2], [0, 0]]
    grid = Grid(column(1.0, 2.0), column(8.0, 8.0), torch.tensor([[1, 2, 3], [1, 1, 2]]))
    assert form.encode(x, grid).tolist() == [[15, 8, 8, 8, 9], [15, 15, 9, 9, 8]]
    assert form.decode(form.encode(x, grid), grid).tolist() == [[7, 0, 0, 0, 3], [14, 14, 2, 2, 0]]


@pytest.mark.parametrize("form", [Affine(4), Log2(4), Adaptive(4)], ids=str)
def test_a_format_without_an_axis_has_one_range(form):
    x = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(form.rows(x), x.flatten()[None])
    codes = form.encode(x, form.params(torch.zeros(1), torch.ones(1)))
    assert codes.shape == x.shape and codes.dtype == torch.uint8


@pytest.mark.parametrize("form", [Affine(4, axis=0), Mixed((4, 4), signed=False)], ids=str)
def test_the_codes_of_a_convolution_are_rows_by_columns(form):
    x = torch.randn(2, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    grid = form.params(column(-3.0, -3.0), column(3.0, 3.0))
    codes = form.encode(x, grid)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == form.encode(x.flatten(1), grid).tolist()


def test_values_beyond_the_range_take_its_ends():
    x = torch.tensor([-9.0, -1.0, 0.0, 2.0, 9.0])
    form = Affine(2)
    grid = form.params(torch.tensor(-1.0), torch.tensor(2.0))
    assert form.encode(x, grid).tolist() == [0, 0, 1, 3, 3]


@pytest.mark.parametrize("signed", [True, False])
def test_unsigned_mixed_rows_are_affine_but_for_one_and_eight_bits(signed):
    bits = (1, 2, 3, 5, 8)
    lo = column(-1.0, -2.0, -0.5, -4.0, -1.0)
    hi = column(3.0, 1.0, 0.25, 1.0, 2.0)
    grid = Mixed(bits, signed=signed).params(lo, hi)
    for row, width in enumerate(bits):
        form = Affine(width, signed=signed or width in (1, 8), axis=0)
        alone = form.params(lo[row : row + 1], hi[row : row + 1])
        assert torch.equal(grid.scale[row], alone.scale[0])
        assert torch.equal(grid.zero[row], alone.zero[0])


def test_the_zero_point_of_one_bit_needs_no_place_in_the_file():
    """A stored zero point is an integer; that of a 1-bit channel is 0.5 whatever was stored."""
    form = Mixed((1, 2))
    stored = Grid(column(6.0, 1.0), column(0.0, 2.0))
    x = torch.tensor([[-1.0, 2.0], [-1.0, 1.0]])
    assert form.encode(x, stored).tolist() == [[0, 1], [1, 3]]
    assert form.decode(form.encode(x, stored), stored).tolist() == [[-3, 3], [-1, 1]]


@pytest.mark.parametrize("form", [Log2(3), Adaptive(3)], ids=str)
@pytest.mark.parametrize("hi", [0.0, 0.5, 2.0])
def test_a_range_from_zero_has_a_scale_that_divides(form, hi):
    grid = form.params(torch.zeros(1), torch.tensor([hi]).half())
    top = hi if isinstance(form, Log2) else hi / 7
    assert grid.scale.item() == pytest.approx(top or 1.0)
    assert grid.scale.dtype == torch.float32
    assert grid.zero.item() == 0 and grid.zero.dtype == torch.float32


def test_log2_codes_count_halvings_of_the_scale():
    form = Log2(3)
    grid = Grid(torch.tensor(0.5), torch.tensor(0.0))
    # 0.36 and 0.35 lie on both sides of 0.5 / sqrt(2), where the rounding turns.
    x = torch.tensor([9.0, 0.5, 0.36, 0.35, 0.25, 0.125, 2.0**-7, 1e-30, 0.0, -1.0])
    assert form.encode(x, grid).tolist() == [0, 0, 0, 1, 1, 2, 6, 7, 7, 7]
    values = torch.tensor([0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 2.0**-7, 0, 0, 0])
    assert torch.equal(form.decode(form.encode(x, grid), grid), values)


def test_a_step_that_becomes_log2_has_one_for_its_zero_point():
    uniform = Grid(torch.tensor([0.1, 0.2]), torch.zeros(2))
    grid = Adaptive(3).choose(uniform, torch.tensor([0.7, 0.8]), torch.tensor([True, False]))
    assert torch.equal(grid.scale, torch.tensor([0.7, 0.2]))
    assert grid.zero.tolist() == [1, 0] and grid.zero.dtype == torch.float32
