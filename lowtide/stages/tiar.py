"""TIAR: rounding of the temporal block for its own features; TFMQ-DM and its extension share it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.costs.workload import rounding_bytes, rounding_work
from lowtide.distributed.world import World
from lowtide.errors import BadInput
from lowtide.models import Unit
from lowtide.stages.base import Job, Stage
from lowtide.stages.reconstruct import Learner
from lowtide.stages.temporal_features import MOST_ROWS, JobFeatures
from lowtide.validation import Count

STAGE = "TIAR"


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
        units = job.adapter.temporal()
        turns = range(0, len(units), job.world.size)
        for start in job.track(turns, "temporal block"):
            self._round_units(job, units[start : start + job.world.size])
        job.maintained = True

    def _round_units(self, job: Job, units: Sequence[Unit]) -> None:
        """Round some units, each on one rank: they read inputs of the model, not each other.

        A unit runs on all its rows in every iteration, so there is no batch to share out.
        """
        iters = self.times * job.settings.iters
        known = {unit.name: job.recorded(STAGE, unit.name) for unit in units}
        rounded: list[tuple[dict[str, Tensor], list[float]]] = []
        missing = [unit for unit in units if known[unit.name] is None]
        for unit in job.world.part(missing):
            learner = Learner(job.changed(world=World()), STAGE, unit, iters)
            rounded.append(self._search(learner))
        for unit, (codes, losses) in zip(missing, job.world.gathered(rounded), strict=True):
            if codes:
                job.report.setdefault("losses", {})[f"{STAGE} {unit.name}"] = losses
                job.record(STAGE, unit.name, codes)
            known[unit.name] = codes
        for unit in units:
            Learner(job, STAGE, unit, iters).take(known[unit.name] or {})

    def _search(self, learner: Learner) -> tuple[dict[str, Tensor], list[float]]:
        """The codes of a unit, on the CPU, and its losses before and after."""
        if not learner.layers:
            return {}, []
        job = learner.job
        unit = learner.unit
        features = JobFeatures(job, unit)
        targets = features.floating()

        def loss(generator: torch.Generator) -> Tensor:
            pairs = zip(features(), targets, strict=True)
            errors = [(ours - theirs).square().sum(1).mean() for ours, theirs in pairs]
            return reduce(torch.add, errors)

        with features.visiting():
            learnt = learner.search(loss)
        codes = {name: each.cpu() for name, each in learnt.items()}
        return codes, job.report["losses"][f"{STAGE} {unit.name}"]

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
