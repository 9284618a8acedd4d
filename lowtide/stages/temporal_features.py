"""The temporal features: what the temporal block tells the rest of the network at each timestep, run without the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lowtide.models import Adapter, Unit
from lowtide.models.trace import flat_inputs
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job

MOST_ROWS = 512
Rows = list[dict[str, Tensor]]


class TemporalFeatures:
    """A temporal unit that can be run on many timesteps at once; calling it on a model gives one tensor per feature."""

    def __init__(self, adapter: Adapter, unit: Unit, rows: Rows):
        self.inputs = {name: torch.stack([row[name] for row in rows]) for name in unit.reads}
        self.graph = adapter.temporal_graph(unit, len(rows))

    def __call__(self, model: nn.Module) -> list[Tensor]:
        device = next(model.parameters()).device
        return self.graph.replay(
            model, {name: value.to(device) for name, value in self.inputs.items()}
        )


class JobFeatures:
    """The features of a unit of the model that a job works on, at every calibrated timestep."""

    def __init__(self, job: Job, unit: Unit):
        self.model, self.unit = job.model, unit
        self.features = TemporalFeatures(job.adapter, unit, rows_of(job, unit))

    def __call__(self) -> list[Tensor]:
        find_clock(self.model).set(self.features.inputs["timestep"])
        return self.features(self.model)

    @torch.no_grad()
    def floating(self) -> list[Tensor]:
        """The float model's features; leaves the unit with quantized weights and float inputs."""
        self.set_precision(Precision.FLOAT)
        features = self()
        self.set_precision(Precision.WEIGHTS)
        return features

    def set_precision(self, precision: Precision) -> None:
        for name in self.unit.layers:
            set_precision(self.model.get_submodule(name), precision)


def rows_of(job: Job, unit: Unit) -> Rows:
    """What the unit is run on: the clock's steps if it reads t alone, else (timestep, condition) pairs."""
    if unit.reads == ("timestep",):
        return step_rows(job)
    return bounded(distinct_rows(job.calls, unit.reads), job.generator("features", unit.name))


def step_rows(job: Job) -> Rows:
    """One row for each of the clock's steps, in its order, as a cache and a table of ranges have it.

    Timesteps that round to one key (Karras' sigmas crowd at the end) are one step: the first that was heard stands for it.
    """
    like = job.calls[0].arguments["timestep"]
    return [{"timestep": torch.tensor(time, dtype=like.dtype)} for time in job.plan.times]


def distinct_rows(calls: Sequence[Call], reads: Sequence[str]) -> Rows:
    """Every different set of values that the unit reads."""
    rows: dict[tuple, dict[str, Tensor]] = {}
    for call in calls:
        given = flat_inputs(call.arguments)
        for sample in range(len(given["timestep"])):
            row = {name: given[name][sample] for name in reads}
            rows.setdefault(tuple(tuple(value.flatten().tolist()) for value in row.values()), row)
    return list(rows.values())


def bounded(rows: Rows, generator: torch.Generator) -> Rows:
    """As many as are run at once, in their order: drawn, for every n-th would be one and the same condition at each step."""
    if len(rows) <= MOST_ROWS:
        return rows
    return [
        rows[place]
        for place in torch.randperm(len(rows), generator=generator)[:MOST_ROWS]
        .sort()
        .values.tolist()
    ]


@torch.no_grad()
def temporal_errors(
    adapter: Adapter, floating: nn.Module, packed: nn.Module, times: Sequence[float] = ()
) -> Tensor:
    """Squared error of the packed model's temporal features, timesteps x features; for a block that reads t alone.

    `times`: the plan's, where a sampler's timesteps are no integers; a cache answers for these, not for their rounded keys.
    """
    clock, columns = find_clock(packed), []
    heard = torch.tensor(times) if times else clock.timesteps.cpu() / clock.ticks
    rows = [{"timestep": timestep} for timestep in heard]
    for unit in adapter.temporal():
        features = TemporalFeatures(adapter, unit, rows)
        target = features(floating)
        clock.set(features.inputs["timestep"])
        columns += [
            (ours - theirs).double().square().sum(1)
            for ours, theirs in zip(features(packed), target, strict=True)
        ]
    return torch.stack(columns, 1)
