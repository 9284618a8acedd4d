"""Every method at every width on one model, from the same calibration data and seeds.

`lowtide bench quality MODEL` runs it. Each cell (method, bits, seed) is a line of its model's
ledger. A bench that was killed continues where it stopped, and several can write side by side. The
table is made from the ledger alone. A cell records a hash of the code that made it, and the table
shows it.
"""

import json
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowtide import quantization, sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.evaluation.metrics import psnr
from lowtide.evaluation.path_errors import (
    Drawn,
    draw,
    error_parts,
    image_error,
    step_error,
    temporal_damage,
)
from lowtide.machine import devices
from lowtide.machine.device_names import AUTO
from lowtide.methods import METHODS, recipe_of, relevant_options, with_profile
from lowtide.models import adapt
from lowtide.nn.plan import FORMAT_VERSION
from lowtide.report.progress import track
from lowtide.sampling.loading import DTYPES
from lowtide.sampling.pipelines import Pipeline
from lowtide.settings import Options, settings_from
from lowtide.stages.base import code_hash

WIDTHS = ("W4A32", "W8A8", "W4A8", "W6A6", "W4A4", "W3A6", "W3A4", "W2A6", "W2A4")
# What must be equal for two cells to be of one table.
CONDITIONS = ("model", "weights", "images", "options", "format")
# A line of a ledger: plain JSON values by name.
Line = dict[str, Any]


@dataclass(frozen=True)
class MethodCell:
    """One quantized model to make and measure."""

    method: str
    width: str
    seed: int
    without: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return self.method + "".join(f" -{name}" for name in self.without)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.title, self.width, self.seed

    def bits(self) -> dict[str, int]:
        """W4A8 -> weights 4, inputs 8."""
        weights, _, inputs = self.width.removeprefix("W").partition("A")
        if not (weights.isdigit() and inputs.isdigit()):
            raise BadInput(f"found width {self.width!r}", "one such as W4A8", "check --widths")
        return {"weights": int(weights), "inputs": int(inputs)}


def grid(methods: str, widths: str, seeds: Sequence[int]) -> list[MethodCell]:
    """Cells of the named methods at the named widths, in the order of the table.

    Empty names mean all of them. `tcaq-par` is tcaq without its stage PAR.
    """
    requests = [name.split("-") for name in _names(methods)] or [[name] for name in METHODS]
    if unknown := [name for name, *_ in requests if name not in METHODS]:
        raise BadInput(
            f"found method {unknown[0]!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`"
        )
    cells: list[MethodCell] = []
    for width in [name.upper() for name in _names(widths)] or WIDTHS:
        for name, *without in requests:
            cells += [MethodCell(name, width, seed, tuple(without)) for seed in seeds]
    for cell in cells:
        cell.bits()
    return cells


def _names(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def quality(
    source: str,
    out: str | Path,
    cells: Sequence[MethodCell],
    options: Options,
    images: int = 64,
    *,
    device: str = AUTO,
) -> list[Line]:
    """Make and measure every cell that is not in the ledger yet. Returns all of them."""
    for cell in cells:
        relevant = relevant_options(cell.method, {**options, **cell.bits()})
        settings = with_profile(cell.method, settings_from(relevant))
        recipe_of(cell.method, settings, cell.without)
    request = sampling.Request(
        steps=options.get("steps", 50),
        seeds=tuple(range(images)),
        batch=images,
        **_request_options(options),
    )
    place = devices.chosen(device)
    dtype = DTYPES[options.get("dtype", AUTO)]
    pipe = sampling.load_pipeline(source, device=place)
    conditions = {
        "model": source,
        "weights": facts.fingerprint(sampling.denoiser(pipe)),
        "images": images,
        "options": _plain(options),
        "format": FORMAT_VERSION,
    }
    done = {_key(line): line for line in finished_cells(out, conditions)}
    original: Drawn | None = None
    for cell in track(cells, total=len(cells), title="methods x bits"):
        if cell.key not in done:
            original = original or draw(pipe, request)
            fresh = sampling.load_pipeline(source, dtype=dtype, device=place)
            line = _measured(fresh, cell, options, request, pipe, original)
            line |= conditions | {"code": code_hash()[:12]}
            done[cell.key] = line
            append_line(out, line)
    return [done[cell.key] for cell in cells]


def _ledger(out: str | Path, source: str) -> Path:
    """The file of one model."""
    return Path(out) / (re.sub(r"[^\w.-]+", "-", source) + ".jsonl")


def append_line(out: str | Path, line: Line) -> None:
    """Append a line in one write, after a line break if a killed bench left half a line."""
    path = _ledger(out, line["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(line) + "\n")


def finished_cells(out: str | Path, like: Line) -> list[Line]:
    """The newest line of every cell made under the conditions that `like` has, by width."""
    conditions = {name: like[name] for name in CONDITIONS if name in like}
    path = _ledger(out, like["model"])
    lines = [_parsed(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = {_key(line): line for line in lines if _alike(line, conditions)}
    order = {width: number for number, width in enumerate(WIDTHS)}
    return sorted(newest.values(), key=lambda line: order.get(line["width"], len(order)))


def _parsed(text: str) -> Line:
    """A line of a ledger; nothing if a kill cut it short."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {}


def _key(line: Line) -> tuple[str, str, int]:
    return line["method"], line["width"], line["seed"]


def _alike(line: Line, conditions: Mapping[str, object]) -> bool:
    """Whether a line is of the same weights, settings and file format."""
    return all(line.get(name) == value for name, value in conditions.items())


def _request_options(options: Options) -> Options:
    """The settings that sampling needs, too."""
    names = {"prompts", "labels", "guidance", "eta", "size", "pictures", "call"}
    names |= {"scheduler", "spacing"}
    return {name: value for name, value in options.items() if name in names}


def _measured(
    pipe: Pipeline,
    cell: MethodCell,
    options: Options,
    request: sampling.Request,
    float_pipe: Pipeline,
    original: Drawn,
) -> Line:
    """Quantize, sample with the same seeds, and compare with the float model."""
    started = time.perf_counter()
    settings: Options = {**options, **cell.bits(), "seed": cell.seed}
    relevant = relevant_options(cell.method, settings)
    result = quantization.quantize(pipe, method=cell.method, without=cell.without, **relevant)
    minutes = (time.perf_counter() - started) / 60
    with tempfile.TemporaryDirectory() as folder:
        size = facts.on_disk(result.save(Path(folder) / "packed"))
    ours = draw(pipe, request)
    distances = np.linalg.norm(ours.path - original.path, axis=(1, 2))
    errors = distances / np.linalg.norm(original.path, axis=(1, 2))
    floating = sampling.denoiser(float_pipe)
    parts = error_parts(floating, ours.calls)
    adapter = adapt(floating, original.calls[0].arguments)
    damage = temporal_damage(float_pipe, sampling.denoiser(pipe), adapter, request)
    line = {
        "method": cell.title,
        "width": cell.width,
        "seed": cell.seed,
        "psnr": round(psnr(ours.images, original.images), 3),
        "end_error": round(image_error(ours.images, original.images), 5),
        "trajectory_error": round(float(errors[1:].mean()), 5),
        "step_error": round(step_error(sampling.denoiser(pipe), original.calls), 5),
        "own_error": round(parts.whole, 5),
        "steady_error": round(parts.steady, 5),
        "bytes": size,
        "minutes": round(minutes, 2),
    }
    if damage:
        line["temporal_error"] = round(damage.mean, 5)
        line["temporal_end_error"] = round(image_error(damage.images, original.images), 5)
    return line


def _plain(options: Options) -> Options:
    """The options as JSON gives them back."""
    return json.loads(json.dumps(options))
