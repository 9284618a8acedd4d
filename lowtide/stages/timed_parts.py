"""Records of work in many small parts: one for several seconds of it, so that small runs have none.

A record is named after its first part, and holds all parts up to the next record. A resumed run
takes it when it comes to this part. What a kill costs is at most the seconds of one record.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from lowtide.distributed.world import World
from lowtide.stages.base import Job

SECONDS = 10.0  # of work in one record
Bounds = tuple[Tensor, Tensor]  # lo and hi


class TimedParts:
    """The records of one turn of a stage, in the folder of the run; none without a folder.

    Each rank keeps the parts that it works on.
    """

    def __init__(self, job: Job, stage: str):
        turn = job.turns[stage]
        job.turns[stage] += 1
        self.stage = f"{stage}{turn}" if turn else stage
        self.job = job.changed(world=World())
        self.started = time.monotonic()

    def recorded(self, first: str) -> dict[str, Tensor] | None:
        """The record that begins with this part."""
        return self.job.recorded(self.stage, first)

    @property
    def due(self) -> bool:
        """Whether the parts since the last record took long enough for a record."""
        return self.job.folder is not None and time.monotonic() - self.started >= SECONDS

    def record(self, first: str, tensors: dict[str, Tensor]) -> None:
        """Keep the parts since the last record."""
        self.job.record(self.stage, first, tensors)
        self.started = time.monotonic()


def bounds_of_each(
    job: Job, stage: str, names: Iterable[str], search: Callable[[str], Bounds]
) -> dict[str, Bounds]:
    """The range that is searched for each name, or was by an interrupted run."""
    parts = TimedParts(job, stage)
    found: dict[str, Bounds] = {}
    fresh: dict[str, Bounds] = {}
    for name in names:
        if name in found:
            continue
        record = parts.recorded(name)
        if record is not None:
            found |= _bounds_of(record)
            continue
        fresh[name] = search(name)
        if parts.due:
            parts.record(next(iter(fresh)), _tensors_of(fresh))
            found |= fresh
            fresh = {}
    return found | fresh


def _tensors_of(bounds: Mapping[str, Bounds]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, (lo, hi) in bounds.items():
        # They may lie in one storage, which a record does not take.
        tensors |= {f"lo {name}": lo.clone(), f"hi {name}": hi.clone()}
    return tensors


def _bounds_of(record: Mapping[str, Tensor]) -> dict[str, Bounds]:
    names = [name.removeprefix("lo ") for name in record if name.startswith("lo ")]
    return {name: (record[f"lo {name}"], record[f"hi {name}"]) for name in names}
