"""TIAR: rounding of the temporal block for its own features; TFMQ-DM and its extension share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.costs.workload import rounding_bytes, rounding_work
from lowtide.distributed.world import World
from lowtide.errors import BadInput
from lowtide.models import Adapter, Unit
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.base import Job, Stage
from lowtide.stages.reconstruct import Learner, report_losses, with_losses
from lowtide.stages.temporal_features import MOST_ROWS, JobFeatures
from lowtide.validation import Count

STAGE = "TIAR"
AT_ONCE = 200_000_000  # weights that take 10 GB while they learn


@dataclass(frozen=True)
class TIAR(Stage):
    """Temporal information aware reconstruction: learn the rounding that keeps the features.

    minimise over the rounding of h and all g_i:
        sum_i || g_i(h(t)) - g^_i(h^(t)) ||^2,   t in {1..T}

    The sum falls apart into one term for each g_i once h is known. So a block of more weights than
    `at_once` learns h first, with its g_i in float, then some g_i after the others.

    times: iterations, as a multiple of a block's. A pass over all t costs next to nothing.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"iters", "early_stop"})

    times: Count = 5
    at_once: Count = AT_ONCE

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
        known = {unit.name: job.recorded(STAGE, unit.name) for unit in units}
        missing = [unit for unit in units if known[unit.name] is None]
        alone = job.changed(world=World())
        rounded = [self._learnt(alone, unit) for unit in job.world.part(missing)]
        for unit, (codes, losses) in zip(missing, job.world.gathered(rounded), strict=True):
            if codes:
                job.report.setdefault("losses", {}).update(losses)
                codes = with_losses(codes, job, *losses)
                job.record(STAGE, unit.name, codes)
            known[unit.name] = codes
        for unit in units:
            report_losses(known[unit.name] or {}, job)
            self._learner(job, unit).take(known[unit.name] or {})

    def _learner(self, job: Job, unit: Unit) -> Learner:
        return Learner(job, STAGE, unit, self.times * job.settings.iters)

    def _learnt(self, job: Job, unit: Unit) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """The codes of a unit, on the CPU, and the losses of its parts before and after."""
        if not unit.features or not self._learner(job, unit).layers:
            return {}, {}
        whole = JobFeatures(job, unit)
        targets = dict(zip(unit.features, whole.floating(), strict=True))
        codes: dict[str, Tensor] = {}
        with whole.visiting():
            for part in parts_of(job.adapter, unit, self.at_once):
                features = JobFeatures(job, part, whole.rows)
                codes |= self._learnt_part(job, features, targets)
        losses = job.report.get("losses", {})
        return codes, {name: losses[name] for name in losses if name.startswith(STAGE)}

    def _learnt_part(
        self, job: Job, features: JobFeatures, targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The codes of a part's layers, which also take them. Later layers are in float."""
        part = features.unit
        learner = self._learner(job, part)

        def loss(generator: torch.Generator) -> Tensor:
            pairs = zip(features(), part.features, strict=True)
            errors = [(ours - targets[name]).square().sum(1).mean() for ours, name in pairs]
            return reduce(torch.add, errors)

        later = [job.model.get_submodule(name) for name in set(part.features) - set(part.layers)]
        for layer in later:
            set_precision(layer, Precision.FLOAT)
        learner.learn(loss)
        for layer in later:
            set_precision(layer, Precision.WEIGHTS)
        return {name: codes.cpu() for name, codes in learner.codes().items()}

    def cost(self, load: Workload) -> Cost:
        """Many passes of every temporal unit over all its rows."""
        iters = self.times * load.settings.iters
        seconds = 0.0
        largest = 0.0
        for unit in load.network.temporal:
            rows = _rows(unit, load)
            for each in parts_of(load.network.adapter, unit, self.at_once):
                part = load.network.temporal_part(each)
                seconds += iters * load.speed.learning(rounding_work(part, rows))
                largest = max(largest, rounding_bytes(part, rows, load.width))
        return Cost(seconds, largest)

    def summary(self, job: Job) -> str:
        return "rounding of the temporal block learnt for its own features"


def parts_of(adapter: Adapter, unit: Unit, at_once: int) -> list[Unit]:
    """What learns together: the whole unit, or h, then groups of g_i of at most `at_once` weights.

    A part's features are those that its rounding moves. A single g_i may be larger than a group.
    """
    sizes = {name: adapter.all_layers[name].weight.numel() for name in unit.layers}
    if sum(sizes.values()) <= at_once:
        return [unit]
    inner = adapter.inner_layers(unit)
    groups: list[list[str]] = []
    room = 0
    for name in unit.layers:
        if name in inner:
            continue
        if not groups or sizes[name] > room:
            groups.append([])
            room = at_once
        groups[-1].append(name)
        room -= sizes[name]
    parts = [(inner, unit.features)] if inner else []
    parts += [(tuple(group), tuple(group)) for group in groups]
    return [
        replace(unit, name=f"{unit.name}+{layers[0]}", layers=layers, features=features)
        for layers, features in parts
    ]


def _rows(unit: Unit, load: Workload) -> int:
    """Timesteps, or (timestep, condition) pairs, that a temporal unit runs on."""
    if unit.reads == ("timestep",):
        return load.steps
    return min(MOST_ROWS, load.steps * load.settings.images * load.branches)
