"""A temporal feature as its cache returns it, and the cache in the place of its layer."""

from dataclasses import dataclass, replace

from torch import Tensor

from lowtide.formats import Grid
from lowtide.nn.feature_cache import quantize_features
from lowtide.nn.plan import CachePlan
from lowtide.stages.base import Job
from lowtide.stages.model_edits import cache_layer


@dataclass(frozen=True)
class CachedFeature:
    """A float feature as its cache returns it: values (steps, width), and the codes and grid."""

    plan: CachePlan
    values: Tensor
    stored: tuple[Tensor, Grid] | None


def cache_feature(plan: CachePlan, feature: Tensor) -> CachedFeature:
    """CM: the float feature, (steps, width), on a grid of its own for each step and part."""
    if plan.format is None:
        return CachedFeature(plan, feature, None)
    codes, grid = quantize_features(feature, plan)
    values = plan.format.decode(codes, grid).reshape(feature.shape)
    return CachedFeature(plan, values, (codes, grid))


def put_feature(job: Job, name: str, feature: CachedFeature, cached: Tensor) -> None:
    """The cache replaces the layer at the steps `cached`; its rows have the clock's order."""
    computed = not bool(cached.all())
    module = cache_layer(job, name, replace(feature.plan, computed=computed))
    if feature.stored is None:
        module.values = feature.values.float().clone()
    else:
        module.fill(*feature.stored)
    if computed:
        module.chosen = cached
