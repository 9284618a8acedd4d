"""Searches: the refined search is as good as trying all candidates, and rows are independent."""

import time

import pytest
import torch

from lowtide.formats import Affine, Mixed, minmax, mse, percentile
from lowtide.formats.search import Norm, range_error

NORM = Norm(2.4, None)


def weights(rows: int = 32, columns: int = 300) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_loses_no_more_than_one_percent_over_trying_all(bits):
    x = weights()
    form = Affine(bits, signed=bits == 8, axis=0)
    lo, hi = minmax(x, form)
    shares = torch.arange(100, 20, -1) / 100
    every = torch.stack([range_error(x, form, (lo * share, hi * share), NORM) for share in shares])
    error = range_error(x, form, mse(x, form), NORM)
    assert (error <= 1.01 * every.amin(0)).all()


def test_mse_beats_minmax_at_four_bits():
    x = weights()
    form = Affine(4, axis=0)
    searched = range_error(x, form, mse(x, form), NORM).sum()
    assert searched / range_error(x, form, minmax(x, form), NORM).sum() < 0.9


def test_rows_are_independent():
    x = weights()
    form = Affine(4, axis=0)
    alone = mse(x[5:6], form)
    together = mse(x, form)
    assert torch.equal(alone[0][0], together[0][5])
    assert torch.equal(alone[1][0], together[1][5])


def test_mixed_rows_are_searched_at_their_own_bits():
    x = weights(2)
    mixed = mse(x, Mixed((2, 8)))
    assert torch.equal(mixed[1][0], mse(x[:1], Affine(2, signed=True, axis=0))[1][0])


def test_percentile_cuts_the_tails():
    x = torch.linspace(0, 1, 1001)[None]
    lo, hi = percentile(x, Affine(8), keep=0.9)
    assert lo.item() == pytest.approx(0.05, abs=1e-3)
    assert hi.item() == pytest.approx(0.95, abs=1e-3)


def test_a_large_convolution_is_searched_in_well_under_a_second():
    x = torch.randn(320, 2880)
    form = Affine(4, axis=0)
    best = min(timed(lambda: mse(x, form)) for _ in range(3))
    assert best < 0.8


def timed(call) -> float:
    """Seconds of processor time: a busy machine makes the wall clock's longer."""
    started = time.process_time()
    call()
    return time.process_time() - started
