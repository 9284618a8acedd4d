"""Input statistics: samples come from all of a tensor, and their tails have their true weight."""

import pytest
import torch

from lowtide.formats import Affine, mse, percentile
from lowtide.nn.clock import Clock
from lowtide.nn.quantizer import Quantizer
from lowtide.stages.fit_ranges import ranges
from lowtide.stages.value_statistics import KEPT_VALUES, TAILS, InputStatistics, sampled


@pytest.mark.parametrize(
    "shape", [(16, 2, 64, 64), (16, 32, 32, 32), (16, 256, 192), (8, 3, 77, 1000)]
)
def test_every_column_has_its_share(shape: tuple[int, ...]) -> None:
    """A stride of numel / 2048 saw column 0 alone in the first two of these."""
    columns = torch.arange(shape[-1]).float().expand(shape)
    statistics = InputStatistics.empty(2)
    statistics.add(columns, 1, torch.Generator().manual_seed(0))
    (kept,) = statistics.samples[1]
    assert len(kept.drawn) == KEPT_VALUES and not statistics.samples[0]
    counts = torch.bincount(kept.drawn.long(), minlength=shape[-1])
    expected = KEPT_VALUES / shape[-1]
    assert (counts > 0).float().mean() > 0.8
    assert counts.max() < expected + 6 * expected**0.5
    assert (statistics.lo[1], statistics.hi[1]) == (0, shape[-1] - 1)


def test_few_values_are_all_kept() -> None:
    values = torch.randn(100)
    kept = sampled(values, torch.Generator())
    assert torch.equal(kept.drawn, values) and torch.equal(kept.weights(), torch.ones(100))


def test_weights_add_up_to_all_values_and_tails_are_the_ends() -> None:
    values = torch.randn(1_000_003)
    kept = sampled(values, torch.Generator().manual_seed(0))
    assert len(kept.tails) == 2 * TAILS
    assert kept.weights().sum().item() == pytest.approx(len(values), rel=1e-5)
    largest = values[: len(values) // TAILS * TAILS].sort().values
    assert kept.tails.max() == largest[-1] and kept.tails.min() == largest[0]
    # Of the 64 greatest values most are the greatest of a part each.
    assert torch.isin(largest[-TAILS:], kept.tails).float().mean() > 0.5


def test_nothing_is_kept_where_no_search_weighs_it() -> None:
    statistics = InputStatistics.empty(1)
    statistics.add(torch.randn(4, 4), 0, None)
    assert statistics.samples == [[]]


def quantizer(bits: int, *, per_step: bool = True) -> Quantizer:
    return Quantizer(Affine(bits), Clock([1, 2, 3, 4]), per_step=per_step)


def rounding_loss(x: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor, form: Affine) -> float:
    grid = form.params(lo.reshape(1), hi.reshape(1))
    return (form.decode(form.encode(x, grid), grid) - x).abs().pow(2.4).mean().item()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("law", ["normal", "laplace", "outliers"])
def test_a_searched_range_is_nearly_as_good_as_one_searched_on_every_value(
    bits: int, law: str
) -> None:
    """It needs the right weight for the tails.

    With the weight of drawn values they were never cut, at 1.1 to 2.5 times the loss. Left out,
    outliers would be cut.
    """
    torch.manual_seed(0)
    x = torch.randn(1 << 18)
    if law == "laplace":
        x = torch.distributions.Laplace(0.0, 1.0).sample((1 << 18,))
    if law == "outliers":
        x.view(64, -1)[5, :100] = 40.0  # a heavy channel at a few places
    statistics = InputStatistics.empty(1)
    statistics.add(x, 0, torch.Generator().manual_seed(1))
    form = Affine(bits)
    ours = rounding_loss(x, *ranges(statistics, quantizer(bits), "mse"), form)
    best = rounding_loss(x, *mse(x[None], form), form)
    assert ours < 1.15 * best
    assert (
        bits == 8
        or law == "outliers"
        or ours < 0.9 * rounding_loss(x, statistics.lo, statistics.hi, form)
    )


def test_percentiles_weigh_values_too() -> None:
    values = torch.arange(11.0)
    weights = torch.ones(11)
    weights[10] = 0.01
    lo, hi = percentile(values[None], Affine(8), weights, keep=0.9)
    assert (lo.item(), hi.item()) == (0.0, 9.0)
    assert percentile(values[None], Affine(8), weights, keep=1.0)[1].item() == 10.0


@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_a_step_that_nothing_reached_takes_the_nearest(search: str) -> None:
    statistics = InputStatistics.empty(4)
    for step, scale in ((1, 1.0), (3, 5.0)):
        statistics.add(scale * torch.randn(1000), step, torch.Generator().manual_seed(0))
    lo, hi = ranges(statistics, quantizer(4), search)
    lo = lo.flatten()
    hi = hi.flatten()
    assert lo.isfinite().all() and hi.isfinite().all()
    assert hi[0] == hi[1] and hi[3] > 3 * hi[1] and hi[2] in (hi[1], hi[3])


def test_all_steps_as_one() -> None:
    statistics = InputStatistics(torch.tensor([-1.0, -3.0]), torch.tensor([2.0, 1.0]), [[], []])
    assert [
        ends.tolist() for ends in ranges(statistics, quantizer(4, per_step=False), "minmax")
    ] == [
        [-3.0],
        [2.0],
    ]


def test_rows_hold_both_ends_and_what_each_value_stands_for() -> None:
    """The ends are in the range of a search, but weigh nothing: a tail is among the sample."""
    statistics = InputStatistics.empty(2)
    for first in (0.0, 10.0):
        statistics.add(first + torch.arange(3.0), 0, torch.Generator())
    large = torch.arange(4096.0)
    statistics.add(large, 1, torch.Generator().manual_seed(0))
    (small, alike), (values, weights) = statistics.rows()
    assert small.tolist() == [0, 12, 0, 1, 2, 10, 11, 12]
    assert alike.tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    share = (4096 - 2 * TAILS) / KEPT_VALUES
    assert weights.tolist() == [0] * 2 + [share] * KEPT_VALUES + [1] * 2 * TAILS
    assert values[:2].tolist() == [0, 4095]
    assert values[-2 * TAILS :].tolist() == [*range(TAILS), *range(4096 - TAILS, 4096)]
    assert [len(drawn) for drawn in statistics.drawn()] == [6, KEPT_VALUES]
    whole = statistics.whole()
    assert (whole.lo.tolist(), whole.hi.tolist()) == ([0], [4095])
    assert whole.samples == [[*statistics.samples[0], *statistics.samples[1]]]


def test_only_what_was_called_has_a_range() -> None:
    statistics = InputStatistics.empty(3)
    assert not statistics.called
    statistics.add(torch.tensor([[-1.0, 2.0]]).half(), 1, None)
    statistics.add(torch.tensor([[-0.5, 3.0]]), 1, None)
    assert statistics.called
    assert statistics.lo.tolist() == [float("inf"), -1, float("inf")]
    assert statistics.filled().lo.tolist() == [-1] * 3
    assert statistics.filled().hi.tolist() == [3] * 3
