"""The demo: each model that is at hand beside its quantized selves, same seeds: a picture, a report and a table."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowtide import zoo
from lowtide.evaluation import comparison
from lowtide.methods import relevant_options
from lowtide.report import grids
from lowtide.workflows import to_folder

WIDTHS = {"weights": 4, "inputs": 8}
Json = dict[str, Any]


@dataclass(frozen=True)
class Act:
    """One model of the demo, and what it is asked to draw."""

    model: str
    title: str
    steps: int
    images: int
    methods: tuple[str, ...] = ("minmax", "best")
    prompts: tuple[str, ...] = ()
    guidance: float | None = None


ACTS = (
    Act("zoo:digits", "zoo:digits", steps=50, images=64, methods=("minmax", "tfmq", "best")),
    Act(
        "zoo:emoji", "zoo:emoji, text to image", steps=25, images=16, guidance=4.0,
        prompts=(
            "sleepy face", "cat face", "snowman", "heart", "rocket", "soccer ball", "tiger face", "hamburger",
            "sunflower", "octopus", "penguin", "butterfly", "crown", "strawberry", "airplane", "red apple",
        ),
    ),
)  # fmt: skip


def demo(out: Path, iters: int = 120, acts: Sequence[Act] = ACTS) -> Json:
    """Quantize each act's model to W4A8 with its methods, save, load, and draw all of them from the same seeds."""
    here = [act for act in acts if act.model.removeprefix("zoo:") in zoo.names()]
    missing = [act.model for act in acts if act not in here]
    return {
        "acts": [perform(act, out / act.model.removeprefix("zoo:"), iters) for act in here],
        "missing": missing,
    }


def perform(act: Act, out: Path, iters: int) -> Json:
    """One model: a folder for each method, the evidence, the picture."""
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    asked: Json = {"prompts": act.prompts, "guidance": act.guidance}
    for method in act.methods:
        options = WIDTHS | {"steps": act.steps, "iters": iters} | asked
        relevant = relevant_options(method, options)
        to_folder.quantize_to_folder(act.model, out / method, method, relevant)
    drawn = {"seeds": tuple(range(act.images)), "steps": act.steps, "batch": 16} | asked
    found = comparison.compare(
        act.model, *(str(out / method) for method in act.methods), out=out / "evidence", **drawn
    )
    rows = [row(model, found) for model in found["models"].values()]
    picture = out / "demo.png"
    title = f"{act.title}, at 4-bit weights and 8-bit inputs, {act.steps} steps, same seeds"
    grids.draw(picture, title, columns(found, rows), table(rows))
    minutes = round((time.perf_counter() - started) / 60, 2)
    return {
        "model": act.model,
        "picture": str(picture),
        "report": found["report"],
        "rows": rows,
        "minutes": minutes,
    }


def row(model: Json, found: Json) -> Json:
    """What the picture's table says of one model."""
    original = model is found["models"][found["reference"]]
    quality = None if original else round(model["metrics"]["psnr"]["value"], 2)
    named = {"name": "Original" if original else f"{model['method']}, W4A8"}
    return named | {
        "bytes": model["bytes"],
        "psnr": quality,
        "seconds_per_step": round(model["seconds_per_step"], 4),
    }


def columns(found: Json, rows: list[Json]) -> list[grids.Column]:
    folder = Path(found["folder"]) / "images"
    return [
        grids.Column(row["name"], quality_line(row), images(folder / key))
        for key, row in zip(found["models"], rows, strict=True)
    ]


def images(folder: Path) -> np.ndarray:
    """The images of one model, in the order of their seeds."""
    found = [
        np.asarray(Image.open(path), np.float32) / 255
        for path in sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    ]
    return np.stack([image if image.ndim == 3 else image[..., None] for image in found])


def quality_line(row: Json) -> str:
    return "the reference" if row["psnr"] is None else f"{row['psnr']:.2f} dB to the original"


def table(rows: list[Json]) -> list[list[str]]:
    head = ["model", "size on disk", "PSNR to the original", "seconds per step, a batch"]
    return [head, *(cells(row, rows[0]) for row in rows)]


def cells(row: Json, original: Json) -> list[str]:
    size = f"{row['bytes'] / 1e6:.2f} MB ({row['bytes'] / original['bytes']:.2f}x)"
    speed = f"{row['seconds_per_step']:.3f} ({row['seconds_per_step'] / original['seconds_per_step']:.2f}x)"
    return [row["name"], size, "" if row["psnr"] is None else f"{row['psnr']:.2f} dB", speed]
