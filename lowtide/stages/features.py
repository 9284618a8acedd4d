"""The temporal features: what the temporal block tells the rest of the network at each timestep, run without the rest."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lowtide.models import Unit
from lowtide.models.trace import flat_inputs
from lowtide.nn.swap import find_clock, look
from lowtide.stages.base import Call, Job

MOST_ROWS = 512


class Features:
    """A temporal unit that can be run on every calibrated timestep at once; calling it gives one tensor per feature."""

    def __init__(self, job: Job, unit: Unit):
        self.model, self.unit = job.model, unit
        self.rows = distinct_rows(job.calls, unit.reads)
        self.inputs = job.on_device({name: torch.stack([row[name] for row in self.rows]) for name in unit.reads})
        self.graph = job.adapter.temporal_graph(unit, len(self.rows))

    def __call__(self) -> list[Tensor]:
        find_clock(self.model).set(self.inputs["timestep"])
        return self.graph.replay(self.model, self.inputs)

    def look(self, quantized: bool, inputs: bool) -> None:
        for name in self.unit.layers:
            look(self.model.get_submodule(name), quantized, inputs)

    @torch.no_grad()
    def floating(self) -> list[Tensor]:
        """The float model's features; leaves the unit with quantized weights and float inputs."""
        self.look(False, False)
        features = self()
        self.look(True, False)
        return features


def distinct_rows(calls: Sequence[Call], reads: Sequence[str]) -> list[dict[str, Tensor]]:
    """Every different set of values that the unit reads: the timesteps, or (timestep, condition) pairs, up to a bound."""
    rows: dict[tuple, dict[str, Tensor]] = {}
    for call in calls:
        given = flat_inputs(call.arguments)
        for sample in range(len(given["timestep"])):
            row = {name: given[name][sample] for name in reads}
            rows.setdefault(tuple(tuple(value.flatten().tolist()) for value in row.values()), row)
            if reads == ("timestep",):
                break
    spread = max(1, -(-len(rows) // MOST_ROWS))
    return list(rows.values())[::spread]


@torch.no_grad()
def temporal_error(job: Job) -> float:
    """Sum over timesteps and features of the squared error that quantized weights and inputs put into the features."""
    total = 0.0
    for unit in job.adapter.temporal():
        features = Features(job, unit)
        target = features.floating()
        features.look(True, True)
        total += sum((ours - theirs).double().square().sum().item() for ours, theirs in zip(features(), target, strict=True))
    return total
