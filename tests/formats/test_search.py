"""Searches: the refined search is as good as trying all candidates, and rows are independent."""

import time

import numpy as np
import pytest
import torch

from lowtide.errors import BadInput
from lowtide.formats import Adaptive, Affine, Log2, Mixed, check_search, minmax, mse, percentile
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


@pytest.mark.parametrize("form", [Affine(2, axis=0), Affine(4, signed=True, axis=0), Log2(3)])
def test_the_search_takes_what_a_loop_over_every_fourth_share_and_its_neighbours_takes(form):
    """The last row would have less error on a range that is wider than its own."""
    x = weights(40).abs()
    x[-1] = torch.tensor([0.3433, 0.6867]).repeat(150)
    x[-1, 0] = 1.0
    lo, hi = mse(x, form)
    for row in range(40):
        share = searched_by_a_loop(x[row : row + 1], form)
        assert hi[row].item() == pytest.approx(x[row].max().item() * share, rel=1e-6)
        assert lo[row].item() == pytest.approx(x[row].min().item() * share, rel=1e-6)


def test_the_search_stops_at_a_fifth_of_the_range():
    x = 0.05 * torch.rand(1, 30_000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 1
    form = Affine(2, axis=0)
    assert mse(x, form)[1].item() == pytest.approx(0.21)
    narrow, searched = (
        range_error(x, form, (0 * x[:, :1], x[:, :1] * end), NORM) for end in (0.17, 0.21)
    )
    assert narrow < searched


def searched_by_a_loop(row: torch.Tensor, form) -> float:
    lo, hi = minmax(row, form)

    def error(percent: int) -> float:
        return range_error(row, form, (lo * percent / 100, hi * percent / 100), NORM).item()

    coarse = min(range(100, 20, -4), key=error)
    return min([coarse, *range(coarse - 3, min(coarse + 3, 100) + 1)], key=error) / 100


@pytest.mark.parametrize("form", [Affine(3), Log2(3), Adaptive(3)], ids=str)
def test_weights_count_values_as_often_as_they_say(form):
    """The weights of one search fit its rare values: without them, the range is another."""
    x = weights(1, 60).abs()
    counts = 1 + 40 * (x[0] > 1.5).long()
    repeated = x.repeat_interleave(counts, 1)
    lo, hi = mse(x, form, counts.float())
    assert hi.item() == pytest.approx(mse(repeated, form)[1].item(), rel=1e-6)
    assert lo.item() == pytest.approx(mse(repeated, form)[0].item(), rel=1e-6)
    assert hi.item() != pytest.approx(mse(x, form)[1].item(), rel=1e-3)


def test_the_error_is_the_weighted_mean_of_a_power():
    difference = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert Norm(3.0, None).of(difference.clone()).tolist() == [[4.5], [13.5]]
    assert Norm(3.0, torch.tensor([1.5, 0.5])).of(difference).tolist() == [[2.75], [6.75]]


def test_a_group_is_searched_as_if_its_scale_were_free():
    x = weights(6, 16)
    grouped = mse(x, Affine(4, signed=True, axis=0, group=16))
    free = mse(x, Affine(4, signed=True, axis=0))
    assert torch.equal(grouped[0], free[0]) and torch.equal(grouped[1], free[1])


@pytest.mark.parametrize(("given", "keep"), [({}, 0.999), ({"keep": 0.5}, 0.5)])
def test_percentile_is_numpys_quantile_in_each_row(given, keep):
    x = weights(3, 501)
    lo, hi = percentile(x, Affine(8), **given)
    expected = np.quantile(x.numpy(), [(1 - keep) / 2, (1 + keep) / 2], axis=1)
    assert lo.shape == hi.shape == (3, 1)
    assert lo[:, 0].tolist() == pytest.approx(expected[0].tolist(), rel=1e-5)
    assert hi[:, 0].tolist() == pytest.approx(expected[1].tolist(), rel=1e-5)


def test_percentile_reads_every_second_of_two_million_values():
    x = torch.zeros(1, 2_000_000)
    x[:, 1::2] = 1
    assert [end.item() for end in percentile(x, Affine(8))] == [0, 0]


@pytest.mark.parametrize(
    ("counts", "keep", "ends"),
    [
        ([8.0, 1.0, 1.0], 0.5, ([2, 6], [2, 6])),
        ([1.0, 8.0, 1.0], 0.9, ([1, 5], [3, 7])),
        ([2.0, 1.0, 1.0], 0.5, ([1, 5], [2, 6])),  # a share that a value reaches ends there
        ([1.0, 1.0, 1.0], 1.0, ([1, 5], [3, 7])),
        ([2.9, 4.7, 3.1], 1.0, ([1, 5], [3, 7])),
    ],
)
def test_percentile_counts_weights(counts, keep, ends):
    x = torch.tensor([[2.0, 1.0, 3.0], [6.0, 7.0, 5.0]])
    lo, hi = percentile(x, Affine(8), torch.tensor(counts), keep=keep)
    assert (lo.tolist(), hi.tolist()) == tuple([[end] for end in side] for side in ends)


def test_percentile_of_weights_whose_shares_round_below_one():
    """In float32, the running sum of these weights stays below their sum."""
    draw = torch.Generator().manual_seed(0)
    counts = torch.rand(1000, generator=draw)
    assert (counts.cumsum(0) / counts.sum())[-1] < 1
    x = torch.arange(1000.0)[None]
    assert percentile(x, Affine(8), counts, keep=1.0)[1].item() == 999


def test_an_unknown_search_is_refused():
    check_search("percentile")
    with pytest.raises(BadInput, match="minmax or mse or percentile"):
        check_search("best")


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
