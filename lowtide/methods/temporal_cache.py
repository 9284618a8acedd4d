"""Temporal Feature Matters: a feature cache (Huang et al., T-PAMI 2025, arXiv 2407.19547).

The temporal features g_i(h(t)) of a block i are a finite set: one for each step t of the schedule.
So the float block can be run once, before quantizing, and its features stored instead of its
weights, each vector on a grid of its own. Where the quantized block (TFMQ's maintenance, TM)
disturbs a feature less than its cached copy (CM), the block computes the feature itself. Where the
block also reads a label, a pooled text, a size or a guidance scale, the set is finite within one
request: there the float block runs once for all steps of a request.

    Temporal information block       adapter.temporal()
    Cache-based maintenance, CM      least || X^_{t,i} - X_{t,i} ||^2 over s and z of a grid, for
                                     each (t, i): cache_feature in advance, else round_features
    Temporal maintenance, TM         stages.tiar.TIAR for weights; one input range per step, see
                                     stages.temporal_features.maintained
    L^temporal_{t,i}                 JobFeatures.disturbance: || X^_{t,i} - X_{t,i} ||^2
    Disturbance-aware selection      selected: tau_{t,i} = L(TM) / L(CM); tau < 1: TM, else CM

The float block stays in the checkpoint, with weights of 8 bits (option `block`) and inputs in
float, so that the features of another schedule can be computed (nn/extension.py). A block of t
alone is then cached at every step, by this block. With `only_schedule` it leaves the checkpoint if
its features are all cached, and so do its float layers (profile `paper`); a block that computes a
feature at any step stays, with its caches beside it. A quantized layer g^_i of a block that reads
more stays beside it where it is taken at some step. The report says how many bytes the block takes
before and after, and which share of all (t, i) is cached.

Departs from the paper: its text is not public beyond a figure. A feature that the network cuts into
parts (scale and shift, or six parts) has a grid for each part. The range of a grid is [min, max]
with both ends shrunk by one share, 0 to 79 %, not each end on its own. TM is judged with quantized
inputs and without rounding its output, which is how it runs here. Timesteps that round to one key
of the clock share a row of the cache: the first of them stands for all. The selection of a block of
t alone needs `only_schedule`.

Caching by request is our reading; the paper's figure shows features of t alone. L^temporal is then
a sum over the (t, condition) pairs of the calibration calls. Where both kinds meet in one block,
g^_i reads the float h(t), which runs anyway. The float block's 8 bits are not the paper's, but its
weights are a third of a DiT (docs/methods/temporal_cache.md measures 8 bits and half precision).
"""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.errors import BadInput
from lowtide.formats import Affine
from lowtide.models import Adapter, Unit
from lowtide.nn.plan import CachePlan, RequestPlan
from lowtide.nn.precision import Precision
from lowtide.nn.request_features import round_features
from lowtide.nn.swap import find_clock
from lowtide.settings import Settings
from lowtide.stages.assign import Assign, weight_format
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.cached_feature import cache_feature, put_feature
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.float_block import FloatBlock, plan_float_block
from lowtide.stages.kept_layers import named_by
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.model_edits import (
    answer_once,
    blank_layer,
    cache_layer,
    request_features,
)
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.temporal_bytes import checkpoint_bytes
from lowtide.stages.temporal_features import MOST_ROWS, JobFeatures, maintained
from lowtide.stages.tiar import TIAR
from lowtide.validation import Within

KEPT = "kept for other schedules, on inputs in float"


@dataclass(frozen=True)
class Maintain(Stage):
    """Cache every temporal feature; with `selection` only at the steps where that disturbs less.

    bits: of a cached value; above 8, it is a float.
    block: bits of the weights of a float block that stays; above 8, they are floats.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"only_schedule"})

    selection: bool = True
    bits: Annotated[int, Within(2, 32)] = 8
    block: Annotated[int, Within(8, 32)] = 8

    def check_model(self, adapter: Adapter, settings: Settings) -> None:
        """Refuse `only_schedule` for a model in which nothing can be cached in advance."""
        if settings.only_schedule and not any(map(_reads_time_alone, adapter.temporal())):
            raise BadInput(
                "found only_schedule with a model that has no block of the timestep alone",
                "a block that reads the timestep and nothing else, which a cache can replace",
                "leave only_schedule out",
            )

    def run(self, job: Job) -> None:
        self.check_model(job.adapter, job.settings)
        names = ("features", "cached_share", "bytes_before", "bytes_after")
        summary: dict[str, float] = dict.fromkeys(names, 0)
        job.report["temporal"] = summary
        cached_pairs = 0.0
        for unit in _maintained_units(job):
            summary["features"] += len(unit.features)
            summary["bytes_before"] += checkpoint_bytes(job, unit)
            if not _reads_time_alone(unit):
                cached_pairs += self.maintain_by_request(job, unit)
            elif job.settings.only_schedule:
                cached_pairs += self.maintain(job, unit)
            else:
                cached_pairs += self.maintain_for_any_schedule(job, unit)
            summary["bytes_after"] += checkpoint_bytes(job, unit)
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
        cached_pairs = 0.0
        computes = False
        for name, original, computed in zip(unit.features, originals, ours, strict=True):
            feature = cache_feature(self.cache_plan(job, name), original)
            cached = selected(features, computed, feature.values, original)
            if not self.selection:
                cached = torch.ones_like(cached)
            put_feature(job, name, feature, cached)
            computes |= not bool(cached.all())
            cached_pairs += float(cached.sum())
        if not computes:
            _drop_unread(job, unit)
        return cached_pairs

    def maintain_for_any_schedule(self, job: Job, unit: Unit) -> float:
        """Cache every feature at every step, and keep the block that computed them."""
        features = JobFeatures(job, unit)
        block = FloatBlock(job, unit, self.block, alone=True)
        for name in unit.layers:
            block.keep(name, KEPT)
        values = features.at(Precision.WEIGHTS)
        for name, value in zip(unit.features, values, strict=True):
            plan = replace(self.cache_plan(job, name), kept=True)
            feature = cache_feature(plan, value)
            put_feature(job, name, feature, torch.ones(len(value), dtype=torch.bool))
        return float(len(unit.features) * len(find_clock(job.model).known))

    def maintain_by_request(self, job: Job, unit: Unit) -> float:
        """The float block, which runs once a request, takes the quantized one's place.

        Where a quantized layer g^_i is better at some steps, it stays beside. Where all of them are
        better at every step, the whole quantized block stays, and runs once a request.
        """
        if not job.plan.layers:
            answer_once(job, unit)
            return 0
        features = JobFeatures(job, unit)
        originals = features.floating()
        ours = maintained(job, unit, features)
        block = FloatBlock(job, unit, self.block)
        plans = [self.cache_plan(job, name) for name in unit.features]
        with block.replacing(unit.layers):
            floats = features.at(Precision.WEIGHTS)
        cached = [round_features(*each) for each in zip(floats, plans, strict=True)]
        marks = self._marks(features, ours, cached, originals)
        if not any(bool(mark.any()) for mark in marks):
            answer_once(job, unit)
            return 0
        for name in unit.layers:
            if name not in unit.features:
                block.keep(name)
        marks = self._marks(features, maintained(job, unit, features), cached, originals)
        for name, plan, mark in zip(unit.features, plans, marks, strict=True):
            block.put_feature(name, plan, mark)
        return float(sum(mark.sum() for mark in marks))

    def _marks(
        self,
        features: JobFeatures,
        ours: list[Tensor],
        cached: list[Tensor],
        originals: list[Tensor],
    ) -> list[Tensor]:
        """For each feature, the steps at which it is cached: (steps,)."""
        marks = [selected(features, *each) for each in zip(ours, cached, originals, strict=True)]
        return marks if self.selection else [torch.ones_like(mark) for mark in marks]

    def cost(self, load: Workload) -> Cost:
        """The features are computed a few times, and each is searched for its grid."""
        values = 0
        passes = 0.0
        for unit in load.network.temporal:
            rows = load.steps
            if not _reads_time_alone(unit):
                rows = min(MOST_ROWS, load.calls * load.batch)
            widths = [_width(load.network.adapter, name) for name in unit.features]
            values += rows * sum(widths)
            passes += 4 * load.forward(load.network.temporal_part(unit), rows)
        return Cost(passes + values * load.speed.search, 4 * FLOAT * values)

    def predict_plan(self, job: Job) -> None:
        """Every feature is cached at every step, which is the usual result."""
        self.check_model(job.adapter, job.settings)
        for unit in _maintained_units(job):
            if _reads_time_alone(unit):
                self._predict_cache(job, unit)
            elif not job.plan.layers:
                answer_once(job, unit)
            else:
                self._predict_by_request(job, unit)

    def _predict_cache(self, job: Job, unit: Unit) -> None:
        kept = not job.settings.only_schedule
        for name in unit.features:
            cache_layer(job, name, replace(self.cache_plan(job, name), kept=kept))
        if not kept:
            _drop_unread(job, unit)
            return
        for name in unit.layers:
            plan_float_block(job, name, weight_format(self.block, None), KEPT)

    def _predict_by_request(self, job: Job, unit: Unit) -> None:
        for name in unit.layers:
            plan_float_block(job, name, weight_format(self.block, None))
        for name in unit.features:
            request_features(job, {name: RequestPlan(unit.reads, self.cache_plan(job, name))})

    def cache_plan(self, job: Job, name: str) -> CachePlan:
        """The cache of this layer's output, used at every step."""
        width = _width(job.adapter, name)
        if self.bits > 8 or named_by(job.settings.keep_float, name):
            return CachePlan(width, None)
        form = Affine(self.bits, signed=False, axis=0)
        return CachePlan(width, form, job.adapter.chunks(name))


def selected(features: JobFeatures, ours: Tensor, cached: Tensor, original: Tensor) -> Tensor:
    """The steps t at which CM is taken: tau = L(TM) / L(CM) >= 1, (steps,)."""
    return features.disturbance(ours, original) >= features.disturbance(cached, original)


def _reads_time_alone(unit: Unit) -> bool:
    return unit.reads == ("timestep",)


def _maintained_units(job: Job) -> list[Unit]:
    """The units with features. If a unit of t alone cannot be cached, the plan says why not.

    It does not matter which of its layers are quantized: the cache is of the float block.
    """
    units: list[Unit] = []
    for unit in job.adapter.temporal():
        if any(not job.adapter.answers_rows(name) for name in unit.features):
            job.plan.left[f"cache of {unit.name}"] = "its answers are no single vectors"
        elif unit.features and (job.plan.layers or not _reads_time_alone(unit)):
            units.append(unit)
        elif _reads_time_alone(unit):
            why = "the rest of the network reads none of its outputs"
            job.plan.left[f"cache of {unit.name}"] = (
                why if job.plan.layers else "nothing is quantized"
            )
    return units


def _width(adapter: Adapter, name: str) -> int:
    """Number of values of a temporal layer's output."""
    layer = adapter.all_layers[name]
    assert isinstance(layer, nn.Linear)
    return layer.out_features


def _drop_unread(job: Job, unit: Unit) -> None:
    """Drop the layers of a block whose features are all cached."""
    for name in unit.layers:
        if name not in unit.features:
            blank_layer(job, name)


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Assign(per_step=True), FitWeights("mse"), TIAR(), Maintain())
    learn_ranges = (LearnRanges(),) if settings.range_iters else ()
    return (*start, Reconstruct(), FitRanges("minmax"), *learn_ranges, Pack())
