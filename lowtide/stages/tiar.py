"""TIAR: rounding the temporal information block for its own features; shared by TFMQ-DM and its extension."""

from dataclasses import dataclass
from typing import ClassVar

import torch

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
    """Temporal information aware reconstruction: round the temporal block so that its features stay put.

    minimise over the rounding of h and all g_i:   sum_i || g_i(h(t)) - g^_i(h^(t)) ||^2,   t in {1..T}

    A pass over all t costs next to nothing, so it gets `times` as many iterations as a block.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"iters", "early_stop"})

    times: Count = 5

    def run(self, job: Job) -> None:
        if job.maintained:
            raise BadInput(
                "found temporal features that are maintained already",
                "TIAR before what caches them",
                "put it first",
            )
        for unit in job.track(job.adapter.temporal(), "temporal block"):
            self.round_unit(job, unit)
        job.maintained = True

    def round_unit(self, job: Job, unit: Unit) -> None:
        features = JobFeatures(job, unit)
        target = features.floating()

        def loss(generator: torch.Generator) -> torch.Tensor:
            return sum(
                (ours - theirs).square().sum(1).mean()
                for ours, theirs in zip(features(), target, strict=True)
            )

        Learner(job, "TIAR", unit, self.times * job.settings.iters).learn(loss)

    def cost(self, load: Workload) -> Cost:
        """Every temporal unit on all its rows, over and over."""
        iters = self.times * load.settings.iters
        parts = [
            (load.network.temporal_part(unit), _rows(unit, load)) for unit in load.network.temporal
        ]
        seconds = sum(
            iters * load.speed.learning(rounding_work(part, rows)) for part, rows in parts
        )
        return Cost(seconds, max((rounding_bytes(part, rows) for part, rows in parts), default=0))


def _rows(unit: Unit, load: Workload) -> int:
    """Timesteps, or (timestep, condition) pairs, that a temporal unit is run on."""
    if unit.reads == ("timestep",):
        return load.steps
    return min(MOST_ROWS, load.steps * load.settings.images * load.branches)
