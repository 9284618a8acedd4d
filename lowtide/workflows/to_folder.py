"""Quantize a model into a folder, and draw images into one."""

import re
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from lowtide import estimate, sampling
from lowtide.checkpoint import facts, folders, provenance
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.checkpoint.verification import problems_of
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.estimate.result import Totals
from lowtide.machine import peak_memory
from lowtide.machine.device_names import AUTO
from lowtide.quantization import quantize, run_digest
from lowtide.report import grids
from lowtide.settings import Options, settings_from
from lowtide.stages import conditions
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
        units = world.of_first(lambda: _units_folder(out))
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
        _remove_units(units)
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
    _remove_units(_units_folder(out))
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


def _units_folder(out: Path) -> Path:
    """OUT.run, where an interrupted run finds its finished units."""
    units = out.with_name(f"{out.name}.run")
    if units.is_symlink() or (units.exists() and not units.is_dir()):
        raise BadInput(
            f"found a file at {units}",
            "room for a folder of finished units",
            "choose another --out",
        )
    return units


def _remove_units(folder: Path) -> None:
    """Remove what finished runs kept in FOLDER/DIGEST, and no other file."""
    for run in folder.glob("*/"):
        if not re.fullmatch("[0-9a-f]{12}", run.name):
            continue
        patterns = (conditions.FILE, "*.new", "units/*.safetensors", "units/*.new")
        for path in chain.from_iterable(map(run.glob, patterns)):
            path.unlink()
        for emptied in (run / "units", run):
            with suppress(OSError):
                emptied.rmdir()
    with suppress(OSError):
        folder.rmdir()


def sample_to_folder(
    source: str,
    out: str | Path,
    request: sampling.Request,
    device: str = AUTO,
    *,
    own_steps: bool = False,
) -> dict[str, object]:
    """Draw one PNG per seed and a grid of them all.

    own_steps: a packed model takes as many steps as it was quantized for.
    """
    out = Path(out)
    folders.recover_missing(source)
    place = folders.written_beside(out, folders.IMAGE_MARKS, sampling.local_folder(source))
    with join().inside(place) as fresh:
        pipe = sampling.as_pipeline(source, device=device)
        model = sampling.denoiser(pipe)
        if own_steps:
            request = replace(request, steps=facts.calibrated_steps(model) or request.steps)
        facts.check_steps(model, request.steps)
        started = time.perf_counter()
        images = sampling.images(pipe, request, show_progress=True)
        seconds = time.perf_counter() - started
        if fresh is not None:
            grids.write_images(fresh, images, request.seeds)
    return {
        "folder": str(out),
        "images": len(images),
        "steps": request.steps,
        "seconds_per_step": round(seconds / request.steps, 4),
    }
