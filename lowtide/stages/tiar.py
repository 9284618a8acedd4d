"""TIAR: rounding of the temporal block for its own features; TFMQ-DM and its extension share it."""

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.costs.workload import rounding_bytes, rounding_work
from lowtide.errors import BadInput
from lowtide.models import Unit
from lowtide.stages.base import Job, Stage
from lowtide.stages.reconstruct import Learner
from lowtide.stages.temporal_features import MOST_ROWS, JobFeatures
from lowtide.validation import Count


@dataclass(frozen=True)
class TIAR(Stage):
    """Temporal information aware reconstruction: learn the rounding that keeps the features.

    minimise over the rounding of h and all g_i:
        sum_i || g_i(h(t)) - g^_i(h^(t)) ||^2,   t in {1..T}

    times: iterations, as a multiple of a block's. A pass over all t costs next to nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"iters", "early_stop"})

    times: Count = 5

    def run(self, job: Job) -> None:
        if job.maintained:
            raise BadInput(
                "found temporal features that are maintained already",
                "TIAR before the stage that caches them",
                "put it first",
            )
        for unit in job.track(job.adapter.temporal(), "temporal block"):
            self._round_unit(job, unit)
        job.maintained = True

    def _round_unit(self, job: Job, unit: Unit) -> None:
        features = JobFeatures(job, unit)
        targets = features.floating()

        def loss(generator: torch.Generator) -> Tensor:
            pairs = zip(features(), targets, strict=True)
            errors = [(ours - theirs).square().sum(1).mean() for ours, theirs in pairs]
            return reduce(torch.add, errors)

        with features.visiting():
            Learner(job, "TIAR", unit, self.times * job.settings.iters).learn(loss)

    def cost(self, load: Workload) -> Cost:
        """Many passes of every temporal unit over all its rows."""
        iters = self.times * load.settings.iters
        seconds = 0.0
        largest = 0.0
        for unit in load.network.temporal:
            part = load.network.temporal_part(unit)
            rows = _rows(unit, load)
            seconds += iters * load.speed.learning(rounding_work(part, rows))
            largest = max(largest, rounding_bytes(part, rows, load.width))
        return Cost(seconds, largest)

    def summary(self, job: Job) -> str:
        return "rounding of the temporal block learnt for its own features"


def _rows(unit: Unit, load: Workload) -> int:
    """Timesteps, or (timestep, condition) pairs, that a temporal unit runs on."""
    if unit.reads == ("timestep",):
        return load.steps
    return min(MOST_ROWS, load.steps * load.settings.images * load.branches)
