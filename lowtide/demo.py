"""The demo: the embedded model beside its quantized selves, same seeds, one picture and one table."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lowtide import run, sample
from lowtide.metrics import psnr
from lowtide.report import grids, text

METHODS = ("minmax", "tfmq")
STEPS = 50
REPEATS = 5


@dataclass(frozen=True)
class Act:
    """One model of the demo: what it drew, how large it is, and one call of its denoiser to time."""

    name: str
    images: np.ndarray
    size: int
    model: nn.Module
    call: tuple[tuple, dict[str, Any]]


def demo(out: Path, model: str = "zoo:digits", images: int = 64, iters: int = 150) -> dict[str, Any]:
    """Quantize `model` to W4A8 with each method, save, load, sample, draw."""
    out.mkdir(parents=True, exist_ok=True)
    request = sample.Request(steps=STEPS, seeds=tuple(range(images)), batch=32)
    acts = [perform("float", model, request)]
    for method in METHODS:
        options = {"weights": 4, "inputs": 8, "steps": STEPS, "iters": iters}
        run.quantize_to_folder(model, out / method, method, options)
        acts.append(perform(method, str(out / method), request))
    seconds = step_seconds(acts)
    rows = [describe(act, acts[0], each) for act, each in zip(acts, seconds, strict=True)]
    picture = out / "demo.png"
    grids.draw(
        picture, f"{model} at 4-bit weights, 8-bit inputs, DDIM {STEPS} steps, same seeds", columns(acts, rows), table(rows)
    )
    return {"picture": str(picture), "rows": rows}


def perform(name: str, source: str, request: sample.Request) -> Act:
    """Draw the images, and keep the denoiser's last call."""
    pipe = sample.load_pipeline(source)
    model, heard = sample.denoiser(pipe), {}
    hook = model.register_forward_pre_hook(lambda module, args, kwargs: heard.update(last=(args, kwargs)), with_kwargs=True)
    images = sample.images(pipe, request, lambda batches, total: text.track(batches, total, f"sampling {name}"))
    hook.remove()
    size = run.parameter_bytes(model) if name == "float" else run.on_disk(sample.local_folder(source))
    return Act(name, images, size, model, heard["last"])


@torch.no_grad()
def step_seconds(acts: list[Act]) -> list[float]:
    """Median seconds of one denoiser call, the models taking turns, because the machine may be busy with other things."""
    seconds: list[list[float]] = [[] for _ in acts]
    for _ in range(REPEATS):
        for act, taken in zip(acts, seconds, strict=True):
            args, kwargs = act.call
            started = time.perf_counter()
            act.model(*args, **kwargs)
            taken.append(time.perf_counter() - started)
    return [statistics.median(taken) for taken in seconds]


def describe(act: Act, original: Act, seconds: float) -> dict[str, Any]:
    quality = None if act is original else round(psnr(act.images, original.images), 2)
    return {"name": act.name, "bytes": act.size, "psnr": quality, "seconds_per_step": round(seconds, 4)}


def columns(acts: list[Act], rows: list[dict[str, Any]]) -> list[grids.Column]:
    return [grids.Column(title(row), quality_line(row), act.images) for act, row in zip(acts, rows, strict=True)]


def title(row: dict[str, Any]) -> str:
    return "Original, float32" if row["psnr"] is None else f"{row['name']}, W4A8"


def quality_line(row: dict[str, Any]) -> str:
    return "the reference" if row["psnr"] is None else f"{row['psnr']:.2f} dB to the original"


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    head = ["model", "size on disk", "PSNR to the original", "seconds per step, 32 images"]
    return [head, *(cells(row, rows[0]) for row in rows)]


def cells(row: dict[str, Any], original: dict[str, Any]) -> list[str]:
    size = f"{row['bytes'] / 1e6:.2f} MB ({row['bytes'] / original['bytes']:.2f}x)"
    speed = f"{row['seconds_per_step']:.3f} ({row['seconds_per_step'] / original['seconds_per_step']:.2f}x)"
    return [title(row), size, "" if row["psnr"] is None else f"{row['psnr']:.2f} dB", speed]
