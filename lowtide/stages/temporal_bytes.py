"""Bytes that a temporal unit takes in the checkpoint: its layers, its caches, its input ranges."""

from math import prod

from torch import nn

from lowtide.costs import FLOAT
from lowtide.formats import Affine, Mixed, packed_bytes, table_words
from lowtide.models import Unit
from lowtide.nn.packed import grid_places, packed_shape
from lowtide.nn.plan import CachePlan, LayerPlan
from lowtide.nn.swap import find_clock
from lowtide.stages.base import Job

# Bytes of an input range or of a cache's grid: a float32 scale and a uint8 zero point.
RANGE_BYTES = 5


def checkpoint_bytes(job: Job, unit: Unit) -> int:
    """Bytes of the unit as planned now: caches and layers that stay."""
    caches = {name: job.plan.cached[name] for name in unit.features if name in job.plan.cached}
    replaced = {name for name, cache in caches.items() if not (cache.computed or cache.kept)}
    layers = [name for name in unit.layers if name not in replaced | job.plan.blank.keys()]
    steps = len(job.plan.timesteps)
    cached = sum(_cache_bytes(cache, steps) for cache in caches.values())
    requests = sum(_request_bytes(job, name, steps) for name in unit.features)
    float_plan = LayerPlan(None, None)
    planned = {name: job.plan.layers.get(name, float_plan) for name in layers}
    return cached + requests + sum(_layer_bytes(job, *each) for each in planned.items())


def _layer_bytes(job: Job, name: str, plan: LayerPlan) -> int:
    """Weight, its grid, bias, and the ranges of the input: a scale and a zero in each column."""
    layer = job.adapter.all_layers[name]
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    bias = 0 if layer.bias is None else layer.bias.nbytes
    columns = find_clock(job.model).scale.shape[1]
    rest = bias + (RANGE_BYTES * columns if plan.input else 0)
    smooth = layer.weight.shape[1] if plan.smooth else 0
    if plan.weight is None:
        return layer.weight.nbytes + rest + FLOAT * smooth
    assert isinstance(plan.weight, Affine | Mixed)
    rows, inner = layer.weight.flatten(1).shape
    words = table_words(grid_places(rows, inner, plan.weight, smooth))
    return prod(packed_shape(rows, inner, plan.weight)) + FLOAT * words + rest


def _cache_bytes(plan: CachePlan, steps: int) -> int:
    """Values, or codes and a grid for each part; a mark for each step if any is computed."""
    marks = steps if plan.computed else 0
    if plan.format is None:
        return FLOAT * steps * plan.width + marks
    codes = packed_bytes(plan.width // plan.chunks, plan.format.bits)
    return steps * plan.chunks * (codes + RANGE_BYTES) + marks


def _request_bytes(job: Job, name: str, steps: int) -> int:
    """The second layer beside one that computes some steps, and a mark for each step."""
    request = job.plan.requests.get(name)
    if request is None or request.cache is None or not request.cache.computed:
        return 0
    exact = 0 if request.exact is None else _layer_bytes(job, name, request.exact)
    return steps + exact
