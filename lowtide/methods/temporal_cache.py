"""Temporal Feature Matters: temporal features cached where that disturbs less (Huang et al., T-PAMI 2025, arXiv 2407.19547).

The temporal features g_i(h(t)) of a block i are a finite set: one for each step t of the schedule. So the float block can
be run once, before quantizing, and its answers kept instead of its weights, each vector on a grid of its own. Where the
quantized block (TFMQ's maintenance, TM) happens to disturb a feature less than its cached copy (CM), it answers itself.

    Temporal information block        adapter.temporal(), those units that read t alone
    Cache-based maintenance, CM       cache_feature: least || X^_{t,i} - X_{t,i} ||^2 over a grid's s and z, per (t, i)
    Temporal maintenance, TM          stages.temporal.TIAR for weights, one input range per step (input_ranges here)
    L^temporal_{t,i}                  disturbance: || X^_{t,i} - X_{t,i} ||^2 against the float feature
    Disturbance-aware selection       tau_{t,i} = L(TM) / L(CM);  tau < 1: TM, else CM      (class Maintain)

A block whose features are all cached leaves the checkpoint, its float layers (profile `paper`) too. One that answers at any
step stays, and its caches come on top, so that the checkpoint can come out smaller than tfmq's or larger. The report says what
the block took and takes now, and which share of (t, i) was cached.

Departs from the paper: its text is not public beyond a figure, so the cache takes the bits of the inputs (8 where they stay
in float would lose something: there it is float32), and a feature that the network cuts into scale and shift (or six parts)
gets a grid for each part. The range that a grid spans is searched as [min, max] with both ends shrunk by one share, 0 to
79 %, not each end on its own. TM is judged with quantized inputs and, as it will run here, without rounding its answer.
Timesteps that round to one key of the clock share a row: the first that was heard stands for it (stages/features.py).
With `keep_temporal` every step is cached and the float block stays in the checkpoint, so that a new schedule can rebuild
the cache (checkpoint/rescheduling.py). Where the block also reads a label or pooled text (DiT, SDXL, SD3, Flux) no cache made
beforehand can be right: there the quantized block answers, once for all steps of a request (nn/temporal.py), never with a
stale value.
"""

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.formats import Affine, Grid, bundle_words, packed_bytes
from lowtide.models import Unit
from lowtide.nn.feature_cache import gridded
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

RANGE = 5  # bytes of a scale, float32, and its zero, uint8


@dataclass(frozen=True)
class Maintain(Stage):
    """Cache-based maintenance of every temporal feature; with `selection` only at the steps where it disturbs less."""

    selection: bool = True

    def run(self, job: Job) -> None:
        seen = job.report["temporal"] = {
            "features": 0,
            "cached_share": 0.0,
            "bytes_before": 0,
            "bytes_after": 0,
        }
        for unit in job.adapter.temporal():
            if cacheable(job, unit):
                self.maintain(job, unit, seen)
            elif unit.reads != ("timestep",) and unit.features:
                answer_once(job, unit)
        job.maintained = True
        pairs = seen["features"] * len(find_clock(job.model).known)
        seen["cached_share"] = seen["cached_share"] / pairs if pairs else 0.0
        seen["by_request"] = len(job.plan.requests)

    def maintain(self, job: Job, unit: Unit, seen: dict[str, float]) -> None:
        seen["bytes_before"] += checkpoint_bytes(job, unit)
        features = JobFeatures(job, unit)
        target, ours = features.floating(), maintained(job, unit, features)
        computed = False
        for name, float_feature, quantized in zip(unit.features, target, ours, strict=True):
            values, codes, grid, plan = cache_feature(job, name, float_feature)
            loses = disturbance(quantized, float_feature) >= disturbance(values, float_feature)
            chosen = (
                loses
                if self.selection and not job.settings.keep_temporal
                else torch.ones_like(loses)
            )
            computed |= not bool(chosen.all())
            put(
                job,
                name,
                CachePlan(plan.width, plan.format, plan.chunks, not bool(chosen.all()), plan.kept),
                (values, codes, grid),
            )
            if not bool(chosen.all()):
                job.model.get_submodule(name).chosen = chosen
            seen["features"] += 1
            seen["cached_share"] += float(chosen.sum())
        silence(job, unit, computed)
        seen["bytes_after"] += checkpoint_bytes(job, unit)

    def cost(self, load: Workload) -> Cost:
        """The features run a few times, and each is searched for its grid."""
        units = [unit for unit in load.network.temporal if unit.reads == ("timestep",)]
        layers = load.network.adapter.all_layers
        features = [name for unit in units for name in unit.features]
        values = sum(load.steps * layers[name].out_features for name in features)
        parts = [load.network.temporal_part(unit) for unit in units]
        passes = sum(4 * load.forward(part, load.steps) for part in parts)
        return Cost(passes + values * load.speed.search, 4 * FLOAT * values)

    def foresee(self, job: Job) -> None:
        """Every feature is cached at every step, which is how it mostly ends."""
        for unit in job.adapter.temporal():
            if cacheable(job, unit):
                _foresee_cache(job, unit)
            elif unit.reads != ("timestep",) and unit.features:
                answer_once(job, unit)


def _foresee_cache(job: Job, unit: Unit) -> None:
    bits = job.settings.inputs
    form = Affine(bits, signed=False, axis=0) if bits <= 8 else None
    for name in unit.features:
        width = job.adapter.all_layers[name].out_features
        chunks = job.adapter.chunks(name) if form else 1
        cache_layer(job, name, CachePlan(width, form, chunks, kept=job.settings.keep_temporal))
    silence(job, unit, computed=False)


def cacheable(job: Job, unit: Unit) -> bool:
    """A unit that reads t alone, whatever of it is quantized: the cache is of the float block. The plan says why not."""
    if unit.reads != ("timestep",):
        return False
    if job.plan.layers and unit.features:
        return True
    why = "none of its answers meets the picture" if job.plan.layers else "nothing is quantized"
    job.plan.left[f"cache of {unit.name}"] = why
    return False


def maintained(job: Job, unit: Unit, features: JobFeatures) -> list[Tensor]:
    """The features as TM answers them: rounded weights, and inputs on the ranges of their steps."""
    input_ranges(job, unit, features)
    with torch.no_grad():
        features.set_precision(Precision.FULL)
        ours = features()
        features.set_precision(Precision.WEIGHTS)
    return ours


def input_ranges(job: Job, unit: Unit, features: JobFeatures) -> None:
    """FSC for the block alone: all its inputs at step t are one vector, whose ends are the range."""
    layers = [job.model.get_submodule(name) for name in unit.layers]
    layers = [
        layer
        for layer in layers
        if isinstance(layer, QuantizedLayer) and layer.input.format is not None
    ]

    def fit(quantizer: Quantizer, args: tuple) -> None:
        lo, hi = args[0].flatten(1).aminmax(dim=1)
        quantizer.fit(*((lo, hi) if quantizer.per_step else (lo.min()[None], hi.max()[None])))

    # At the quantizer's own door: a smoothed layer divides what reaches it first.
    hooks = [layer.input.register_forward_pre_hook(fit) for layer in layers]
    with torch.no_grad():
        features()
    for hook in hooks:
        hook.remove()


def disturbance(ours: Tensor, theirs: Tensor) -> Tensor:
    """L^temporal of one block, for each t."""
    return (ours - theirs).double().square().sum(1)


def cache_feature(
    job: Job, name: str, feature: Tensor
) -> tuple[Tensor, Tensor | None, Grid | None, CachePlan]:
    """The float feature, steps x width, on its own grid for each step and part: values, codes, grid, plan."""
    bits, chunks = job.settings.inputs, job.adapter.chunks(name)
    kept = job.settings.keep_temporal
    if bits > 8:
        return feature, None, None, CachePlan(feature.shape[1], None, kept=kept)
    plan = CachePlan(feature.shape[1], Affine(bits, False, 0), chunks, kept=kept)
    codes, grid = gridded(feature, plan)
    return plan.format.decode(codes, grid).reshape(feature.shape), codes, grid, plan


def put(
    job: Job, name: str, plan: CachePlan, found: tuple[Tensor, Tensor | None, Grid | None]
) -> None:
    """The cache takes the layer's place. Rows stand in the clock's order, which is that of the distinct timesteps."""
    cached, (values, codes, grid) = cache_layer(job, name, plan), found
    if grid is None:
        cached.values = values.float().clone()
    else:
        cached.fill(codes, grid)


def silence(job: Job, unit: Unit, computed: bool) -> None:
    """Layers that only served the features, in float too, have nobody left to serve; kept ones go back to float."""
    for name in unit.layers:
        if job.settings.keep_temporal:
            leave_float(job, name, "kept to rebuild the cache (keep_temporal)")
        elif not computed and name not in unit.features:
            blank_layer(job, name)


def checkpoint_bytes(job: Job, unit: Unit) -> int:
    """What the unit takes in the checkpoint as the plan is now: caches, and the layers that stay."""
    steps, table = len(job.plan.timesteps), find_clock(job.model).scale.shape[1]
    caches = {name: job.plan.cached[name] for name in unit.features if name in job.plan.cached}
    gone = {
        name for name, cache in caches.items() if not cache.computed and not cache.kept
    } | job.plan.blank.keys()
    stay = [name for name in unit.layers if name not in gone]
    return sum(cache_bytes(cache, steps) for cache in caches.values()) + sum(
        layer_bytes(job, name, table) for name in stay
    )


def layer_bytes(job: Job, name: str, table: int) -> int:
    """Weight, its grid, bias, and a row of `table` input ranges, each a scale and a zero."""
    layer, plan = job.adapter.all_layers[name], job.plan.layers.get(name, LayerPlan(None, None))
    rows, columns = layer.weight.flatten(1).shape
    bias = 0 if layer.bias is None else layer.bias.nbytes
    ranges, smooth = RANGE * table if plan.input else 0, layer.weight.shape[1] if plan.smooth else 0
    if plan.weight is None:
        return layer.weight.nbytes + bias + ranges + 4 * smooth
    words = bundle_words(grid_places(rows, columns, plan.weight, smooth))
    return prod(packed_shape(rows, columns, plan.weight)) + 4 * words + bias + ranges


def cache_bytes(plan: CachePlan, steps: int) -> int:
    """Values, or codes and a grid for each part; and a mark for each step, where the layer answers some."""
    marks = steps if plan.computed else 0
    if plan.format is None:
        return 4 * steps * plan.width + marks
    return (
        steps * plan.chunks * (packed_bytes(plan.width // plan.chunks, plan.format.bits) + RANGE)
        + marks
    )


def recipe(settings: Settings) -> Recipe:
    learnt = (LearnRanges(),) if settings.range_iters else ()
    start = (Collect(), Assign(per_step=True), FitWeights("mse"), TIAR(), Maintain())
    return (*start, Reconstruct(), FitRanges("minmax"), *learnt, Pack())
