"""Quantize a model into a folder, and go on where an interrupted run stopped."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowtide import estimate, sampling
from lowtide.checkpoint import facts, folders, provenance
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.checkpoint.verification import problems_of
from lowtide.distributed.world import join
from lowtide.estimate.result import Totals
from lowtide.machine import peak_memory
from lowtide.quantization import quantize, run_digest
from lowtide.settings import Options, settings_from
from lowtide.stages.finished_work import folder_beside, remove_runs
from lowtide.workflows.limits import Limits, check_limits


def quantize_to_folder(
    source: str,
    out: str | Path,
    method: str,
    options: Options,
    fuse_lora: str | None = None,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
) -> dict[str, object]:
    """Load, quantize, save. Finished units stay in OUT.run until the model stands at OUT.

    Nothing is done where OUT holds this very result, or where the run would exceed the limits.
    Returns the report of the run as plain JSON values. The first process of torchrun writes.
    """
    out = Path(out)
    world = join()
    folders.recover_missing(source)
    settings = settings_from({name: value for name, value in options.items() if name != "without"})
    if done := world.of_first(lambda: _finished(source, out, method, options, fuse_lora)):
        return done
    place = folders.written_beside(out, source=sampling.local_folder(source))
    with world.inside(place) as fresh:
        units = world.of_first(lambda: folder_beside(out))
        predicted = world.of_first(lambda: _predicted(source, out, method, options, limits))
        started = time.perf_counter()
        with peak_memory.Peak() as peak:
            lora = fuse_lora or False
            result = quantize(source, method=method, folder=units, fuse_lora=lora, **options)
            if fresh is not None:
                result.write(fresh)
        minutes = round((time.perf_counter() - started) / 60, 2)
        report: dict[str, object] = {
            "model": source,
            "method": method,
            "folder": str(out),
            "minutes": minutes,
        }
        report |= world.of_first(lambda: _sizes(result, fresh))
        report |= {"peak_bytes": peak.above, "predicted": predicted}
        report |= result.plan.summary | result.run_report()
        added = {"fuse_lora": provenance.lasting_file(fuse_lora)} if fuse_lora else {}
        record = provenance.Provenance(
            command=provenance.command(),
            source=provenance.lasting_source(source),
            fingerprint=result.report["fingerprint"],
            method=method,
            settings=asdict(settings) | added,
            without=tuple(options.get("without", ())),
            report=report,
        )
        if fresh is not None:
            record.write(fresh)
    if world.first:
        remove_runs(units)
    return report


def _predicted(source: str, out: Path, method: str, options: Options, limits: Limits) -> Totals:
    """What the run is predicted to take, once it is known that this is there."""
    found = estimate.plan(source, method=method, **options)
    check_limits(found, out, limits)
    return found.totals()


def _finished(
    source: str, out: Path, method: str, options: Options, fuse_lora: str | None
) -> dict[str, object] | None:
    """The report of the run at OUT, if that is whole, and the result of the same run."""
    place = folders.check_place(out, source=sampling.local_folder(source))
    if not (place / provenance.NAME).is_file():
        return None
    record = provenance.read(out)
    digest = run_digest(source, method, fuse_lora=fuse_lora or False, **_of_a_run(options))
    if record is None or record.report.get("run") != digest or problems_of(out):
        return None
    line = f"{out} holds this result: the same model, settings and code. Nothing is done."
    print(line, file=sys.stderr)
    remove_runs(folder_beside(out))
    return record.report


def _of_a_run(options: Options) -> dict[str, Any]:
    """The settings, and the stages that are left out, as `run_digest` takes them."""
    settings = {name: value for name, value in options.items() if name != "without"}
    return {"options": settings, "without": tuple(options.get("without", ()))}


def _sizes(result: Quantized, folder: Path | None) -> dict[str, int]:
    return {
        "bytes": result.report["account"]["total"],
        "on_disk": facts.on_disk(folder) if folder else 0,
    }
