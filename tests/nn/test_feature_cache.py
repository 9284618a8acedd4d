"""The grids of a feature cache: each row has the range with the least squared error."""

import torch

from lowtide.formats import Affine, mse
from lowtide.nn.feature_cache import quantize_features
from lowtide.nn.plan import CachePlan

CHUNKS = 2
PLAN = CachePlan(512, Affine(3, axis=0), CHUNKS)


def squared_error(rows: torch.Tensor, ends: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    grid = PLAN.format.params(*ends, len(rows))
    return (PLAN.format.decode(PLAN.format.encode(rows, grid), grid) - rows).square().sum(1)


def test_a_cache_has_the_least_squared_error_of_all_shrunk_ranges():
    torch.manual_seed(0)
    # Long tails, so that the best range depends on the norm.
    features = torch.randn(50, PLAN.width) ** 3
    codes, grid = quantize_features(features, PLAN)
    rows = features.reshape(50 * CHUNKS, -1)
    ours = (PLAN.format.decode(codes, grid) - rows).square().sum(1)
    lo, hi = rows.aminmax(dim=1, keepdim=True)
    shares = 1 - 0.01 * torch.arange(80)
    best = torch.stack([squared_error(rows, (lo * share, hi * share)) for share in shares]).amin(0)
    assert (ours >= best * 0.999).all()
    assert ours.sum() < 1.001 * best.sum()
    weight_search = squared_error(rows, mse(rows, PLAN.format))
    assert ours.sum() < 0.997 * weight_search.sum()
