"""A cache's grids: the range that loses least of each row's squares."""

import torch

from lowtide.formats import Affine, mse
from lowtide.nn.feature_cache import gridded
from lowtide.nn.plan import CachePlan

CHUNKS = 2
PLAN = CachePlan(512, Affine(3, axis=0), CHUNKS)


def lost(rows: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    grid = PLAN.format.params(*ends, len(rows))
    return (PLAN.format.decode(PLAN.format.encode(rows, grid), grid) - rows).square().sum(1)


def test_a_cache_loses_the_least_squares_that_a_shrunk_range_can():
    torch.manual_seed(0)
    features = torch.randn(50, PLAN.width) ** 3  # long tails: where to cut depends on the norm
    codes, grid = gridded(features, PLAN)
    rows = features.reshape(50 * CHUNKS, -1)
    ours = (PLAN.format.decode(codes, grid) - rows).square().sum(1)
    lo, hi = rows.aminmax(dim=1, keepdim=True)
    best = torch.stack(
        [lost(rows, (lo * share, hi * share)) for share in (1 - 0.01 * torch.arange(80))]
    ).amin(0)
    assert (ours >= best * 0.999).all()
    assert ours.sum() < 1.001 * best.sum()
    assert (
        ours.sum() < 0.997 * lost(rows, mse(rows, PLAN.format)).sum()
    )  # the search that weights get
