"""The demo: the embedded model beside its quantized selves, same seeds, one picture and one table."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowtide import run, sample
from lowtide.metrics import psnr
from lowtide.report import grids

METHODS = ("minmax", "tfmq")
STEPS = 50


@dataclass(frozen=True)
class Act:
    """One model of the demo: what it drew, how large it is, how long a step took."""

    name: str
    images: np.ndarray
    size: int
    seconds_per_step: float


def demo(out: Path, model: str = "zoo:digits", images: int = 64, iters: int = 150) -> dict[str, Any]:
    """Quantize `model` to W4A8 with each method, save, load, sample, draw."""
    out.mkdir(parents=True, exist_ok=True)
    request = sample.Request(steps=STEPS, seeds=tuple(range(images)), batch=images)
    acts = [perform("float", model, request)]
    for method in METHODS:
        options = {"weights": 4, "inputs": 8, "steps": STEPS, "iters": iters}
        run.quantize_to_folder(model, out / method, method, options)
        acts.append(perform(method, str(out / method), request))
    rows = [describe(act, acts[0]) for act in acts]
    picture = out / "demo.png"
    grids.draw(
        picture, f"{model} at 4-bit weights, 8-bit inputs, DDIM {STEPS} steps, same seeds", columns(acts, rows), table(rows)
    )
    return {"picture": str(picture), "rows": rows}


def perform(name: str, source: str, request: sample.Request) -> Act:
    pipe = sample.load_pipeline(source)
    started = time.perf_counter()
    images = sample.images(pipe, request)
    seconds = (time.perf_counter() - started) / request.steps
    size = run.on_disk(sample.local_folder(source))
    return Act(name, images, size if name != "float" else run.parameter_bytes(sample.denoiser(pipe)), seconds)


def describe(act: Act, original: Act) -> dict[str, Any]:
    quality = None if act is original else round(psnr(act.images, original.images), 2)
    return {"name": act.name, "bytes": act.size, "psnr": quality, "seconds_per_step": round(act.seconds_per_step, 4)}


def columns(acts: list[Act], rows: list[dict[str, Any]]) -> list[grids.Column]:
    return [grids.Column(title(row), quality_line(row), act.images) for act, row in zip(acts, rows, strict=True)]


def title(row: dict[str, Any]) -> str:
    return "Original, float32" if row["psnr"] is None else f"{row['name']}, W4A8"


def quality_line(row: dict[str, Any]) -> str:
    return "the reference" if row["psnr"] is None else f"{row['psnr']:.2f} dB to the original"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["model", "size on disk", "PSNR to the original", f"seconds per step ({len(rows) and 'batch of all images'})"]
    return [head, *(cells(row, rows[0]) for row in rows)]


def cells(row: dict[str, Any], original: dict[str, Any]) -> list[str]:
    share = f"{row['bytes'] / 1e6:.2f} MB ({row['bytes'] / original['bytes']:.2f}x)"
    quality = "" if row["psnr"] is None else f"{row['psnr']:.2f} dB"
    return [title(row), share, quality, f"{row['seconds_per_step']:.3f}"]
