"""Quantize a model into a folder, and draw images into one."""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowtide import estimate, sampling
from lowtide.checkpoint import folders, provenance
from lowtide.checkpoint.facts import on_disk, parameter_bytes
from lowtide.machine import peak_memory
from lowtide.quantization import quantize
from lowtide.report import grids
from lowtide.sampling.drivers import check_steps
from lowtide.settings import settings_from


def quantize_to_folder(
    source: str, out: str | Path, method: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Load, quantize, save; an interrupted run goes on from the folder beside `out`."""
    out = Path(out)
    folders.check_place(out)
    settings = settings_from({name: value for name, value in options.items() if name != "without"})
    predicted, started = estimate.predict(source, method=method, **options), time.perf_counter()
    with peak_memory.Peak() as peak:
        pipe = sampling.load_pipeline(source)
        before = parameter_bytes(sampling.denoiser(pipe))
        result = quantize(pipe, method=method, folder=out.with_name(f"{out.name}.run"), **options)
        result.save(out)
    size = {
        "float_bytes": before,
        "bytes": result.report["account"]["total"],
        "on_disk": on_disk(out),
    }
    size |= {"peak_bytes": peak.above, "predicted": estimate.totals(predicted)}
    whole = {
        "model": source,
        "method": method,
        "folder": str(out),
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }
    found = whole | size | result.plan.summary | result.report
    written = (asdict(settings), tuple(options.get("without", ())), found)
    provenance.Record(
        provenance.command(), lasting(source), found["fingerprint"], method, *written
    ).write(out)
    return found


def lasting(source: str) -> str:
    """The source as it can be found again from another folder."""
    home = None if source.startswith("zoo:") else sampling.local_folder(source)
    return str(home.resolve()) if home else source


def sample_to_folder(
    source: str, out: str | Path, request: sampling.Request, track: Callable
) -> dict[str, Any]:
    """One PNG per seed and a grid of them all."""
    pipe, out = sampling.load_pipeline(source), Path(out)
    check_steps(sampling.denoiser(pipe), request.steps)
    with folders.written_beside(out, ("grid.png",)) as fresh:
        started = time.perf_counter()
        drawn = sampling.images(pipe, request, track)
        seconds = time.perf_counter() - started
        grids.write_images(fresh, drawn, request.seeds)
    return {
        "folder": str(out),
        "images": len(drawn),
        "seconds_per_step": round(seconds / request.steps, 4),
    }
