"""The values that searches weigh come from all of a tensor, whatever its axes are."""

import pytest
import torch

from lowtide.stages.ranges import KEPT_VALUES, nothing_seen, some


@pytest.mark.parametrize("shape", [(16, 2, 64, 64), (16, 32, 32, 32), (16, 256, 192), (8, 3, 77, 1000)])
def test_every_column_has_its_share(shape: tuple[int, ...]) -> None:
    """A stride of numel / 2048 saw column 0 alone in the first two of these."""
    columns = torch.arange(shape[-1]).float().expand(shape)
    seen = nothing_seen(2)
    seen.note(columns, 1, torch.Generator().manual_seed(0))
    (kept,) = seen.values[1]
    assert len(kept) == KEPT_VALUES and not seen.values[0]
    counts = torch.bincount(kept.long(), minlength=shape[-1])
    expected = KEPT_VALUES / shape[-1]
    assert (counts > 0).float().mean() > 0.8
    assert counts.max() < expected + 6 * expected**0.5
    assert (seen.lo[1], seen.hi[1]) == (0, shape[-1] - 1)


def test_few_values_are_all_kept() -> None:
    values = torch.randn(100)
    assert torch.equal(some(values, torch.Generator()), values)


def test_nothing_is_kept_where_no_search_weighs_it() -> None:
    seen = nothing_seen(1)
    seen.note(torch.randn(4, 4), 0, None)
    assert seen.values == [[]]
