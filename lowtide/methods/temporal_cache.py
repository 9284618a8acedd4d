"""Temporal Feature Matters: a feature cache (Huang et al., T-PAMI 2025, arXiv 2407.19547).

The temporal features g_i(h(t)) of a block i are a finite set: one for each step t of the schedule.
So the float block can be run once, before quantizing, and its features stored instead of its
weights, each vector on a grid of its own. Where the quantized block (TFMQ's maintenance, TM)
disturbs a feature less than its cached copy (CM), the block computes the feature itself.

    Temporal information block       adapter.temporal(), those units that read t alone
    Cache-based maintenance, CM      cache_feature: least || X^_{t,i} - X_{t,i} ||^2 over s and z of
                                     a grid, for each (t, i)
    Temporal maintenance, TM         stages.tiar.TIAR for weights; one input range per step, see
                                     input_ranges
    L^temporal_{t,i}                 disturbance: || X^_{t,i} - X_{t,i} ||^2 to the float feature
    Disturbance-aware selection      class Maintain: tau_{t,i} = L(TM) / L(CM); tau < 1: TM, else CM

A block whose features are all cached leaves the checkpoint, and so do its float layers (profile
`paper`). A block that computes a feature at any step stays, with its caches beside it, so the
checkpoint can be smaller than that of tfmq or larger. The report says how many bytes the block
takes before and after, and which share of all (t, i) is cached.

Departs from the paper: its text is not public beyond a figure. The cache takes the bits of the
inputs; where inputs stay in float, 8 bits would lose something, and the cache is float32. A
feature that the network cuts into parts (scale and shift, or six parts) has a grid for each part.
The range of a grid is [min, max] with both ends shrunk by one share, 0 to 79 %, not each end on
its own. TM is judged with quantized inputs and without rounding its output, which is how it runs
here. Timesteps that round to one key of the clock share a row of the cache: the first of them
stands for all (stages/temporal_features.py). With `keep_temporal` every step is cached and the
float block stays in the checkpoint, so that the cache can be rebuilt for a new schedule
(checkpoint/rescheduling.py). Where the block also reads a label or pooled text (DiT, SDXL, SD3,
Flux), no cache made in advance can be right: there the quantized block runs once for all steps of
a request (nn/request_cache.py), so no value is ever stale.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.errors import BadInput
from lowtide.formats import Affine, Grid, Mixed, packed_bytes, table_words
from lowtide.models import Adapter, Unit
from lowtide.nn.feature_cache import quantize_features
from lowtide.nn.packed import grid_places, packed_shape
from lowtide.nn.plan import CachePlan, LayerPlan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import answer_once, blank_layer, cache_layer, leave_float
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.temporal_features import JobFeatures
from lowtide.stages.tiar import TIAR

# Bytes of an input range or of a cache's grid: a float32 scale and a uint8 zero point.
RANGE_BYTES = 5


@dataclass(frozen=True)
class Maintain(Stage):
    """Cache every temporal feature; with `selection` only at the steps where that disturbs less."""

    reads: ClassVar[frozenset[str]] = frozenset({"keep_temporal"})

    selection: bool = True

    def check_model(self, adapter: Adapter, settings: Settings) -> None:
        """Refuse `keep_temporal` for a model in which nothing can be cached in advance."""
        if settings.keep_temporal and not any(map(_reads_time_alone, adapter.temporal())):
            raise BadInput(
                "found keep_temporal with a model that has no block of the timestep alone",
                "a block that reads the timestep and nothing else, which can be cached",
                "leave keep_temporal out",
            )

    def run(self, job: Job) -> None:
        self.check_model(job.adapter, job.settings)
        names = ("features", "cached_share", "bytes_before", "bytes_after")
        summary: dict[str, float] = dict.fromkeys(names, 0)
        job.report["temporal"] = summary
        cached_pairs = 0.0
        for unit in job.adapter.temporal():
            if _cacheable(job, unit):
                summary["features"] += len(unit.features)
                summary["bytes_before"] += _checkpoint_bytes(job, unit)
                cached_pairs += self.maintain(job, unit)
                summary["bytes_after"] += _checkpoint_bytes(job, unit)
            elif not _reads_time_alone(unit) and unit.features:
                answer_once(job, unit)
        job.maintained = True
        pairs = summary["features"] * len(find_clock(job.model).known)
        summary["cached_share"] = cached_pairs / pairs if pairs else 0.0
        summary["by_request"] = len(job.plan.requests)

    def summary(self, job: Job) -> str:
        return f"{job.report['temporal']['features']} temporal features cached"

    def maintain(self, job: Job, unit: Unit) -> float:
        """Put caches in the place of the unit's features; how many pairs (t, i) are cached."""
        features = JobFeatures(job, unit)
        originals = features.floating()
        ours = maintained(job, unit, features)
        everywhere = not self.selection or job.settings.keep_temporal
        cached_pairs = 0.0
        computes = False
        for name, original, computed in zip(unit.features, originals, ours, strict=True):
            feature = cache_feature(job, name, original)
            cached = disturbance(computed, original) >= disturbance(feature.values, original)
            if everywhere:
                cached = torch.ones_like(cached)
            _put(job, name, feature, cached)
            computes |= not bool(cached.all())
            cached_pairs += float(cached.sum())
        _drop_unread(job, unit, computes=computes)
        return cached_pairs

    def cost(self, load: Workload) -> Cost:
        """The features are computed a few times, and each is searched for its grid."""
        units = [unit for unit in load.network.temporal if _reads_time_alone(unit)]
        values = 0
        passes = 0.0
        for unit in units:
            widths = [_width(load.network.adapter, name) for name in unit.features]
            values += load.steps * sum(widths)
            passes += 4 * load.forward(load.network.temporal_part(unit), load.steps)
        return Cost(passes + values * load.speed.search, 4 * FLOAT * values)

    def predict_plan(self, job: Job) -> None:
        """Every feature is cached at every step, which is the usual result."""
        self.check_model(job.adapter, job.settings)
        for unit in job.adapter.temporal():
            if _cacheable(job, unit):
                for name in unit.features:
                    cache_layer(job, name, _cache_plan(job, name))
                _drop_unread(job, unit, computes=False)
            elif not _reads_time_alone(unit) and unit.features:
                answer_once(job, unit)


@dataclass(frozen=True)
class CachedFeature:
    """A float feature as its cache returns it: values (steps, width), and the codes and grid."""

    plan: CachePlan
    values: Tensor
    stored: tuple[Tensor, Grid] | None


def cache_feature(job: Job, name: str, feature: Tensor) -> CachedFeature:
    """CM: the float feature, (steps, width), on a grid of its own for each step and part."""
    plan = _cache_plan(job, name)
    if plan.format is None:
        return CachedFeature(plan, feature, None)
    codes, grid = quantize_features(feature, plan)
    values = plan.format.decode(codes, grid).reshape(feature.shape)
    return CachedFeature(plan, values, (codes, grid))


def maintained(job: Job, unit: Unit, features: JobFeatures) -> list[Tensor]:
    """TM: the features with rounded weights, and inputs on the ranges of their steps."""
    input_ranges(job, unit, features)
    with torch.no_grad():
        features.set_precision(Precision.FULL)
        values = features()
        features.set_precision(Precision.WEIGHTS)
    return values


def input_ranges(job: Job, unit: Unit, features: JobFeatures) -> None:
    """FSC for this block: each input at step t is one vector, and its ends are the range."""

    def fit(quantizer: Quantizer, args: tuple[Tensor]) -> None:
        lo, hi = args[0].flatten(1).aminmax(dim=1)
        if quantizer.per_step:
            quantizer.fit(lo, hi)
        else:
            quantizer.fit(lo.min()[None], hi.max()[None])

    layers = [job.model.get_submodule(name) for name in unit.layers]
    inputs = [layer.input for layer in layers if isinstance(layer, QuantizedLayer)]
    # Hooks of the quantizer, not of the layer: a smoothed layer divides its input first.
    hooks = [each.register_forward_pre_hook(fit) for each in inputs if each.format is not None]
    with torch.no_grad():
        features()
    for hook in hooks:
        hook.remove()


def disturbance(feature: Tensor, original: Tensor) -> Tensor:
    """L^temporal of one block for each t: (steps, width) -> (steps,)."""
    return (feature - original).double().square().sum(1)


def _reads_time_alone(unit: Unit) -> bool:
    return unit.reads == ("timestep",)


def _cacheable(job: Job, unit: Unit) -> bool:
    """Whether the unit can be cached; if it reads t alone, the plan says why not.

    It does not matter which of its layers are quantized: the cache is of the float block.
    """
    if not _reads_time_alone(unit):
        return False
    if job.plan.layers and unit.features:
        return True
    why = "the rest of the network reads none of its outputs"
    job.plan.left[f"cache of {unit.name}"] = why if job.plan.layers else "nothing is quantized"
    return False


def _cache_plan(job: Job, name: str) -> CachePlan:
    """The cache of this layer's output, used at every step."""
    width = _width(job.adapter, name)
    kept = job.settings.keep_temporal
    bits = job.settings.inputs
    if bits > 8:
        return CachePlan(width, None, kept=kept)
    form = Affine(bits, signed=False, axis=0)
    return CachePlan(width, form, job.adapter.chunks(name), kept=kept)


def _width(adapter: Adapter, name: str) -> int:
    """Number of values of a temporal layer's output."""
    layer = adapter.all_layers[name]
    assert isinstance(layer, nn.Linear)
    return layer.out_features


def _put(job: Job, name: str, feature: CachedFeature, cached: Tensor) -> None:
    """The cache replaces the layer at the steps `cached`; its rows have the clock's order."""
    computed = not bool(cached.all())
    module = cache_layer(job, name, replace(feature.plan, computed=computed))
    if feature.stored is None:
        module.values = feature.values.float().clone()
    else:
        module.fill(*feature.stored)
    if computed:
        module.chosen = cached


def _drop_unread(job: Job, unit: Unit, *, computes: bool) -> None:
    """QDrop layers that nothing reads any more; `keep_temporal` keeps all of them in float."""
    for name in unit.layers:
        if job.settings.keep_temporal:
            leave_float(job, name, "kept to rebuild the cache (keep_temporal)")
        elif not computes and name not in unit.features:
            blank_layer(job, name)


def _checkpoint_bytes(job: Job, unit: Unit) -> int:
    """Bytes of the unit in the checkpoint, as planned now: caches and layers that stay."""
    caches = {name: job.plan.cached[name] for name in unit.features if name in job.plan.cached}
    replaced = {name for name, cache in caches.items() if not (cache.computed or cache.kept)}
    layers = [name for name in unit.layers if name not in replaced | job.plan.blank.keys()]
    steps = len(job.plan.timesteps)
    columns = find_clock(job.model).scale.shape[1]
    cached = sum(_cache_bytes(cache, steps) for cache in caches.values())
    return cached + sum(_layer_bytes(job, name, columns) for name in layers)


def _layer_bytes(job: Job, name: str, columns: int) -> int:
    """Weight, its grid, bias, and the ranges of the input: a scale and a zero in each column."""
    layer = job.adapter.all_layers[name]
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    plan = job.plan.layers.get(name, LayerPlan(None, None))
    bias = 0 if layer.bias is None else layer.bias.nbytes
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


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Assign(per_step=True), FitWeights("mse"), TIAR(), Maintain())
    learn_ranges = (LearnRanges(),) if settings.range_iters else ()
    return (*start, Reconstruct(), FitRanges("minmax"), *learn_ranges, Pack())
