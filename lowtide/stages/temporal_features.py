"""Temporal features: the outputs of the temporal block, without the rest of the network."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from lowtide.models import Adapter, Unit
from lowtide.models.named_inputs import flat_inputs
from lowtide.nn.clock import Clock, step_of_rows
from lowtide.nn.feature_cache import one_row_each
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_features import PerRequest
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.value_statistics import InputStatistics

MOST_ROWS = 512
Rows = list[dict[str, Tensor]]  # the inputs of a temporal unit, one row each, by name


class TemporalFeatures:
    """A temporal unit that runs on many rows at once; its call gives one tensor per feature."""

    def __init__(self, adapter: Adapter, unit: Unit, rows: Rows):
        self.inputs = {name: torch.stack([row[name] for row in rows]) for name in unit.reads}
        self.graph = adapter.temporal_graph(unit, len(rows))

    def __call__(self, model: nn.Module) -> list[Tensor]:
        """The features of this model, each rows x width."""
        device = next(model.parameters()).device
        inputs = {name: value.to(device) for name, value in self.inputs.items()}
        rows = len(inputs["timestep"])
        return [one_row_each(answer, rows) for answer in self.graph.replay(model, inputs)]


class JobFeatures:
    """The features of a temporal unit of a job's model, at every calibrated timestep."""

    def __init__(self, job: Job, unit: Unit, rows: Rows | None = None):
        """`rows`: those of the whole unit, where this is a part of it."""
        self.model = job.model
        self.placement = job.placement
        self.unit = unit
        self.rows = rows or _rows_of(job, unit)
        self.features = TemporalFeatures(job.adapter, unit, self.rows)

    def __call__(self) -> list[Tensor]:
        """The features at the unit's precision now, each rows x width."""
        find_clock(self.model).set(self.features.inputs["timestep"])
        with self.visiting():
            return self.features(self.model)

    def visiting(self) -> AbstractContextManager[None]:
        """A context in which the unit's layers are on the device."""
        return self.placement.visit(*map(self.model.get_submodule, self.unit.layers))

    @torch.no_grad()
    def at(self, precision: Precision) -> list[Tensor]:
        """The features at this precision. The unit then has quantized weights and float inputs."""
        self.set_precision(precision)
        features = self()
        self.set_precision(Precision.WEIGHTS)
        return features

    def floating(self) -> list[Tensor]:
        """The float model's features."""
        return self.at(Precision.FLOAT)

    def set_precision(self, precision: Precision) -> None:
        """Set the precision of the unit's layers."""
        for name in self.unit.layers:
            set_precision(self.model.get_submodule(name), precision)

    def disturbance(self, features: Tensor, originals: Tensor) -> Tensor:
        """The squared error of one feature, summed over the rows of each step: (steps,)."""
        clock = find_clock(self.model)
        clock.set(self.features.inputs["timestep"])
        errors = (features - originals).double().square().sum(1)
        return errors.new_zeros(len(clock.known)).index_add(0, _step_of_rows(errors, clock), errors)


def maintained(job: Job, unit: Unit, features: JobFeatures) -> list[Tensor]:
    """TM: the features with rounded weights, and inputs on the ranges of their steps."""
    input_ranges(job, unit, features)
    return features.at(Precision.FULL)


def input_ranges(job: Job, unit: Unit, features: JobFeatures) -> None:
    """FSC for this block: the ends of each input over the rows of step t are its range."""
    clock = find_clock(job.model)

    def fit(quantizer: Quantizer, args: tuple[Tensor]) -> None:
        lo, hi = args[0].float().flatten(1).aminmax(dim=1)
        if not quantizer.per_step:
            quantizer.fit(lo.min()[None], hi.max()[None])
            return
        rows = _step_of_rows(lo, clock)
        ends = InputStatistics.empty(len(clock.known), lo.device)
        ends.lo.scatter_reduce_(0, rows, lo, "amin")
        ends.hi.scatter_reduce_(0, rows, hi, "amax")
        found = ends.filled()
        quantizer.fit(found.lo, found.hi)

    layers = [job.model.get_submodule(name) for name in unit.layers]
    inputs = [layer.input for layer in layers if isinstance(layer, QuantizedLayer)]
    # Hooks of the quantizer, not of the layer: a smoothed layer divides its input first.
    hooks = [each.register_forward_pre_hook(fit) for each in inputs if each.format is not None]
    features.at(Precision.WEIGHTS)
    for hook in hooks:
        hook.remove()


def _step_of_rows(rows: Tensor, clock: Clock) -> Tensor:
    """The step of each row that ran last: (rows,)."""
    return step_of_rows(clock.index.to(rows.device), len(rows)).expand(len(rows))


def _rows_of(job: Job, unit: Unit) -> Rows:
    """The rows to run a unit on.

    They are the clock's steps, or (timestep, condition) pairs if it reads a condition too.
    """
    if unit.reads == ("timestep",):
        return _step_rows(job)
    rows = _distinct_rows(job.calls, unit.reads)
    return bounded(rows, job.generator("features", unit.name))


def _step_rows(job: Job) -> Rows:
    """One row for each of the clock's steps, in its order, as in caches and tables of ranges.

    Timesteps that round to one key are one step, as Karras' sigmas do at the end of a schedule.
    The first of them stands for the step.
    """
    like = job.calls[0].arguments["timestep"]
    return [{"timestep": torch.tensor(time, dtype=like.dtype)} for time in job.plan.times]


def _distinct_rows(calls: Sequence[Call], reads: Sequence[str]) -> Rows:
    """Every different set of values that the unit reads."""
    rows: dict[tuple, dict[str, Tensor]] = {}
    for call in calls:
        inputs = flat_inputs(call.arguments)
        for sample in range(len(inputs["timestep"])):
            row = {name: inputs[name][sample] for name in reads}
            values = tuple(tuple(value.flatten().tolist()) for value in row.values())
            rows.setdefault(values, row)
    return list(rows.values())


def bounded(rows: Rows, generator: torch.Generator) -> Rows:
    """At most MOST_ROWS rows, in their order.

    They are drawn at random: every n-th row could be one and the same condition at each step.
    """
    if len(rows) <= MOST_ROWS:
        return rows
    drawn = torch.randperm(len(rows), generator=generator)[:MOST_ROWS]
    return [rows[place] for place in drawn.sort().values.tolist()]


@torch.no_grad()
def temporal_errors(
    adapter: Adapter,
    floating: nn.Module,
    packed: nn.Module,
    times: Sequence[float] = (),
    conditions: Mapping[str, Tensor] = {},
) -> Tensor:
    """Squared errors of the packed model's temporal features, timesteps x features.

    `times` are the plan's, where a sampler's timesteps are no integers: a cache is made for these,
    not for their rounded keys. `conditions`: what the block reads besides, of one sample.
    """
    clock = find_clock(packed)
    timesteps = torch.tensor(times or list(clock.known)) / (1 if times else clock.ticks)
    rows = [{"timestep": timestep, **conditions} for timestep in timesteps]
    columns: list[Tensor] = []
    with computing_features(packed):
        for unit in adapter.temporal():
            features = TemporalFeatures(adapter, unit, rows)
            targets = features(floating)
            clock.set(features.inputs["timestep"])
            for ours, theirs in zip(features(packed), targets, strict=True):
                columns.append((ours - theirs).double().square().sum(1))
    return torch.stack(columns, 1)


@contextmanager
def computing_features(packed: nn.Module) -> Iterator[None]:
    """Within the context, no layer answers from the cache of a request."""
    layers = [module for module in packed.modules() if isinstance(module, PerRequest)]
    caches = {layer.cache for layer in layers if layer.cache is not None}
    for cache in caches:
        cache.building = True
    try:
        yield
    finally:
        for cache in caches:
            cache.building = False
