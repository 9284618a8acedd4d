"""What an earlier command of the same request left: finished batches, or the whole evidence."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from lowtide import sampling
from lowtide.checkpoint.manifest import altered
from lowtide.checkpoint.request_digest import digest_of, request_digest, stamp
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.evaluation.compared_models import ComparedModel
from lowtide.evaluation.scores import MeasurementPlan
from lowtide.report import evidence
from lowtide.report.evidence import Evidence
from lowtide.stages.conditions import applied
from lowtide.stages.finished_work import (
    FinishedWork,
    finished_work,
    folder_beside,
    remove_runs,
)

LORAS = ("fuse_lora", "side_lora")


@dataclass(frozen=True)
class Digests:
    """Two hashes: of all that decides the images, and of all that decides the evidence."""

    images: str
    evidence: str


def digests_of(
    models: Sequence[ComparedModel], request: sampling.Request, plan: MeasurementPlan, title: str
) -> Digests | None:
    """The digests of a comparison; None if one of its models is in memory, and has no name."""
    if not all(model.named for model in models):
        return None
    place = next(models[0].denoiser.parameters()).device
    sources = [model.source for model in models]
    keys = [model.key for model in models]
    named = chain.from_iterable(map(_loras, models))
    loras = [stamp(Path(name)) for name in named]
    images = request_digest(sources, request, place, title=title, keys=keys, loras=loras)
    if images is None:
        return None
    extractor = plan.full_name("fd")
    dataset = stamp(plan.dataset) if plan.dataset else None
    limits = dict(plan.limits)
    measured = [images, plan.metrics, extractor, dataset, limits, plan.explicit, plan.device.type]
    return Digests(images, digest_of(measured))


def _loras(model: ComparedModel) -> list[str]:
    """The LoRAs that the record of a packed model names."""
    settings = model.record.settings if model.record else {}
    return [settings[name] for name in LORAS if isinstance(settings.get(name), str)]


def finished_evidence(out: Path, digests: Digests | None) -> Evidence | None:
    """The evidence at OUT, if it is whole, and of this very comparison."""
    if digests is None or not (out / evidence.NAME).is_file() or altered(out):
        return None
    with suppress(BadInput):
        return _told(evidence.read(out), out, digests)
    return None


def _told(found: Evidence, out: Path, digests: Digests) -> Evidence | None:
    """The evidence if it is of this comparison, which one line says."""
    if found.run != digests.evidence:
        return None
    line = f"{out} holds this evidence: the same models, settings and code. Nothing is done."
    print(line, file=sys.stderr)
    remove_runs(folder_beside(out))
    return found


@contextmanager
def resumed(
    models: Sequence[ComparedModel], out: Path, digests: Digests | None
) -> Iterator[FinishedWork | None]:
    """What an interrupted command finished, and the conditions that it began with.

    None where nothing can be kept.
    """
    world = join()
    runs = world.of_first(lambda: folder_beside(out))
    place = next(models[0].denoiser.parameters()).device
    work = finished_work(runs, digests and digests.images, place, world)
    if work is None:
        yield None
        return
    work.announce()
    work.keep_engines([model.denoiser for model in models])
    with applied(work.conditions):
        yield work
