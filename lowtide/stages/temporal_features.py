"""Temporal features: the outputs of the temporal block, without the rest of the network."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from lowtide.models import Adapter, Unit
from lowtide.models.trace import flat_inputs
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job

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
        return self.graph.replay(model, inputs)


class JobFeatures:
    """The features of a temporal unit of a job's model, at every calibrated timestep."""

    def __init__(self, job: Job, unit: Unit):
        self.model = job.model
        self.placement = job.placement
        self.unit = unit
        self.features = TemporalFeatures(job.adapter, unit, _rows_of(job, unit))

    def __call__(self) -> list[Tensor]:
        """The features at the unit's precision now, each rows x width."""
        find_clock(self.model).set(self.features.inputs["timestep"])
        with self.visiting():
            return self.features(self.model)

    def visiting(self) -> AbstractContextManager[None]:
        """A context in which the unit's layers are on the device."""
        return self.placement.visit(*map(self.model.get_submodule, self.unit.layers))

    @torch.no_grad()
    def floating(self) -> list[Tensor]:
        """The float model's features. The unit then has quantized weights and float inputs."""
        self.set_precision(Precision.FLOAT)
        features = self()
        self.set_precision(Precision.WEIGHTS)
        return features

    def set_precision(self, precision: Precision) -> None:
        """Set the precision of the unit's layers."""
        for name in self.unit.layers:
            set_precision(self.model.get_submodule(name), precision)


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
    adapter: Adapter, floating: nn.Module, packed: nn.Module, times: Sequence[float] = ()
) -> Tensor:
    """Squared errors of the packed model's temporal features, timesteps x features.

    For a block that reads t alone. `times` are the plan's, where a sampler's timesteps are no
    integers: a cache is made for these, not for their rounded keys.
    """
    clock = find_clock(packed)
    timesteps = torch.tensor(times) if times else clock.timesteps.cpu() / clock.ticks
    rows = [{"timestep": timestep} for timestep in timesteps]
    columns: list[Tensor] = []
    for unit in adapter.temporal():
        features = TemporalFeatures(adapter, unit, rows)
        targets = features(floating)
        clock.set(features.inputs["timestep"])
        for ours, theirs in zip(features(packed), targets, strict=True):
            columns.append((ours - theirs).double().square().sum(1))
    return torch.stack(columns, 1)
