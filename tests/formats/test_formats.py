"""Formats: codes are in range, values on the grid, weights fit an int8, zero channels stay zero."""

import pytest
import torch

from lowtide.errors import BadInput
from lowtide.formats import (
    Affine,
    Log2,
    Mixed,
    check_bits,
    format_from_json,
    format_to_json,
    minmax,
)


def weight(rows: int = 6, columns: int = 70) -> torch.Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return values * torch.arange(1, rows + 1)[:, None]


def fitted(format, x):
    return format.params(*minmax(format.rows(x), format), x.shape[0])


PLAIN = [
    *(Affine(bits, signed=False, axis=0) for bits in range(2, 9)),
    *(Affine(bits, signed=True, axis=0) for bits in range(2, 9)),
]
GROUPED = [Affine(bits, signed=True, axis=0, group=16) for bits in range(2, 9)]


@pytest.mark.parametrize("form", PLAIN + GROUPED, ids=str)
def test_rounding_is_within_half_a_step(form):
    x = weight()
    grid = fitted(form, x)
    decoded = form.decode(form.encode(x, grid), grid)
    steps = form.steps(grid, x.shape[1]).scale.expand_as(x)
    # A group's factor that was rounded down clips the ends of its group a little.
    bound = 0.5 if form.group is None else 0.6 * 2 ** (form.bits - 1)
    assert ((decoded - x).abs() <= bound * steps + 1e-6).all()


@pytest.mark.parametrize(
    "form",
    [Affine(b, signed=b in (1, 8), axis=0) for b in range(1, 9)]
    + [Affine(b, signed=True, axis=0, group=8) for b in range(2, 9)],
)
def test_every_weight_is_an_int8_times_a_channel_scale(form):
    x = weight()
    grid = fitted(form, x)
    codes = form.encode(x, grid)
    whole = form.decode(codes, grid) / grid.scale * (2 if form.bits == 1 else 1)
    assert (whole - whole.round()).abs().max() < 1e-3
    assert whole.round().min() >= -128
    assert whole.round().max() <= 127


def test_one_bit_signed_is_plus_and_minus():
    form = Affine(1, signed=True, axis=0)
    x = weight()
    grid = fitted(form, x)
    values = form.decode(form.encode(x, grid), grid)
    assert torch.equal(values, x.abs().amax(1, keepdim=True) * torch.where(x < 0, -1.0, 1.0))


@pytest.mark.parametrize(
    "form",
    [
        Affine(4, axis=0),
        Affine(4, signed=True, axis=0),
        Affine(4, signed=True, axis=0, group=8),
        Mixed((2, 3, 4, 4, 5, 8)),
    ],
)
def test_an_all_zero_channel_stays_zero(form):
    x = weight()
    x[2] = 0
    grid = fitted(form, x)
    decoded = form.decode(form.encode(x, grid), grid)
    assert torch.equal(decoded[2], torch.zeros(70))
    assert decoded.isfinite().all()


def test_mixed_is_affine_row_by_row():
    bits = (2, 3, 4, 6, 8, 4)
    x = weight()
    mixed = Mixed(bits)
    grid = fitted(mixed, x)
    decoded = mixed.decode(mixed.encode(x, grid), grid)
    for row, width in enumerate(bits):
        form = Affine(width, signed=True, axis=0)
        alone = fitted(form, x[row : row + 1])
        assert torch.equal(
            decoded[row], form.decode(form.encode(x[row : row + 1], alone), alone)[0]
        )


def test_log2_halves_and_holds_zero():
    form = Log2(4)
    grid = form.params(torch.zeros(1), torch.ones(1))
    x = torch.tensor([1.0, 0.5, 0.25, 2.0**-14, 2.0**-20, 0.0])
    assert torch.equal(
        form.decode(form.encode(x, grid), grid), torch.tensor([1.0, 0.5, 0.25, 2.0**-14, 0.0, 0.0])
    )


@pytest.mark.parametrize("bits", [0, 9, 17, -1, True, 4.0])
def test_wrong_bits_are_refused(bits):
    with pytest.raises(BadInput, match="1 to 8"):
        check_bits(bits, "weights")


@pytest.mark.parametrize("bits", [*range(1, 9), 16, 32])
def test_other_bits_are_returned(bits):
    assert check_bits(bits, "weights") == bits


@pytest.mark.parametrize(
    "form", [None, Affine(4, signed=True, axis=0, group=64), Mixed((1, 2, 3)), Log2(4)]
)
def test_json_round_trip(form):
    assert format_from_json(format_to_json(form)) == form


def test_bits_by_channel_are_a_string_and_a_list_is_read_too():
    assert format_to_json(Mixed((1, 2, 3)))["bits"] == "123"
    assert format_from_json(format_to_json(Mixed((1, 2, 3))) | {"bits": [1, 2, 3]}) == Mixed(
        (1, 2, 3)
    )
