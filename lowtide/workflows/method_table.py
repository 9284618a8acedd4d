"""Every method at every width on one model, from the same calibration data and seeds: `lowtide bench quality MODEL`.

Each cell (method, bits, seed) is a line of its model's ledger, so that a killed bench goes on where it stopped, and benches may
write side by side; the table is drawn from the ledger alone. A cell knows which code made it, and the table says so.
"""

import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide import quantization, sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.evaluation.layer_drift import call
from lowtide.evaluation.metrics import psnr
from lowtide.methods import METHODS, recipe_of, relevant_options
from lowtide.nn.plan import FORMAT_VERSION
from lowtide.report import text
from lowtide.settings import settings_from
from lowtide.stages.base import source as code

WIDTHS = ("W8A8", "W4A8", "W6A6", "W4A4", "W3A6", "W2A6", "W2A4")


@dataclass(frozen=True)
class Cell:
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


def grid(methods: str, widths: str, seeds: Sequence[int]) -> list[Cell]:
    """Cells of all methods (or those named, `tcaq-par` being tcaq without PAR) at all widths, in the order of the table."""
    asked = [name.strip().split("-") for name in methods.split(",") if name.strip()] or [
        [name] for name in METHODS
    ]
    if unknown := [name for name, *_ in asked if name not in METHODS]:
        raise BadInput(
            f"found method {unknown[0]!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`"
        )
    chosen = [width.strip().upper() for width in widths.split(",") if width.strip()] or WIDTHS
    cells = [
        Cell(name, width, seed, tuple(without))
        for width in chosen
        for name, *without in asked
        for seed in seeds
    ]
    for cell in cells:
        cell.bits()
    return cells


@dataclass(frozen=True)
class Drawn:
    """The images of a model, and every call of it on the way."""

    images: np.ndarray
    calls: list[sampling.Moment]

    @property
    def path(self) -> np.ndarray:
        """Where the trajectory stood at each step: calls x samples x values."""
        first = next(iter(self.calls[0].arguments))
        return np.stack([call.arguments[first].flatten(1).float().numpy() for call in self.calls])


def draw(pipe: Any, request: sampling.Request) -> Drawn:
    """Sample one batch, listening at the denoiser's door."""
    heard: list[sampling.Moment] = []
    with sampling.listening(sampling.denoiser(pipe), heard, None):
        images = sampling.run_pipeline(pipe, request)
    return Drawn(images, heard)


@torch.no_grad()
def step_error(model: torch.nn.Module, calls: Sequence[sampling.Moment]) -> float:
    """Relative L2 of the model's answers to those of these calls, for the same inputs, mean over calls.

    Along a trajectory errors add up or cancel, which differs by decibels from seed to seed; here nothing does.
    """
    return float(np.mean([away(answered(model, one.arguments), one.eps) for one in calls]))


def answered(model: torch.nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    found = call(model, arguments)
    return (found if isinstance(found, torch.Tensor) else found[0]).cpu()


def away(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def quality(
    source: str, out: str | Path, cells: Sequence[Cell], options: dict[str, Any], images: int = 64
) -> list[dict[str, Any]]:
    """Make and measure every cell that is not there yet; hand back all of them."""
    for cell in cells:
        relevant = relevant_options(cell.method, options | cell.bits())
        recipe_of(cell.method, settings_from(relevant), cell.without)
    request = sampling.Request(
        steps=options.get("steps", 50), seeds=tuple(range(images)), batch=images, **asked(options)
    )
    pipe = sampling.load_pipeline(source)
    weights = facts.fingerprint(sampling.denoiser(pipe))
    conditions = {
        "model": source,
        "weights": weights,
        "images": images,
        "options": plain(options),
        "format": FORMAT_VERSION,
    }
    done, original = {key(cell): cell for cell in kept(out, conditions)}, None
    for cell in text.track(cells, len(cells), "methods x bits"):
        if cell.key not in done:
            original = original or draw(pipe, request)
            done[cell.key] = (
                measured(source, cell, options, request, original)
                | conditions
                | {"code": code()[:12]}
            )
            note(out, done[cell.key])
    return [done[cell.key] for cell in cells]


def ledger(out: str | Path, source: str) -> Path:
    """Each model has its own."""
    return Path(out) / (re.sub(r"[^\w.-]+", "-", source) + ".jsonl")


def note(out: str | Path, cell: dict[str, Any]) -> None:
    """One write in one piece, on a line of its own even if another bench was killed in the middle of one."""
    path = ledger(out, cell["model"])
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(cell) + "\n")


def kept(out: str | Path, like: dict[str, Any]) -> list[dict[str, Any]]:
    """Every finished cell made under the same conditions as this one, its newest line each, in the order of the widths."""
    conditions = {name: like[name] for name in ("model", "weights", "images", "options", "format")}
    path = ledger(out, like["model"])
    cells = [read(line) for line in path.read_text().splitlines()] if path.exists() else []
    newest = {key(cell): cell for cell in cells if alike(cell, conditions)}
    place = {width: number for number, width in enumerate(WIDTHS)}
    return sorted(newest.values(), key=lambda cell: place.get(cell["width"], len(place)))


def read(line: str) -> dict[str, Any]:
    """A line that a kill tore says nothing."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return {}


def key(cell: dict[str, Any]) -> tuple[str, str, int]:
    return cell["method"], cell["width"], cell["seed"]


def alike(cell: dict[str, Any], conditions: dict[str, Any]) -> bool:
    """A cell of other weights, settings or file format says nothing here."""
    return all(cell.get(name) == value for name, value in conditions.items())


def asked(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: options[name]
        for name in ("prompts", "labels", "guidance", "eta", "size")
        if name in options
    }


def measured(
    source: str, cell: Cell, options: dict[str, Any], request: sampling.Request, original: Drawn
) -> dict[str, Any]:
    """Quantize, sample with the same seeds, and compare with the float model."""
    pipe, started = sampling.load_pipeline(source), time.perf_counter()
    chosen = relevant_options(cell.method, options | cell.bits() | {"seed": cell.seed})
    result = quantization.quantize(pipe, method=cell.method, without=cell.without, **chosen)
    minutes = (time.perf_counter() - started) / 60
    with tempfile.TemporaryDirectory() as folder:
        size = facts.on_disk(result.save(Path(folder) / "packed"))
    ours = draw(pipe, request)
    apart = np.linalg.norm(ours.path - original.path, axis=(1, 2)) / np.linalg.norm(
        original.path, axis=(1, 2)
    )
    return {
        "method": cell.title,
        "width": cell.width,
        "seed": cell.seed,
        "psnr": round(psnr(ours.images, original.images), 3),
        "trajectory_error": round(float(apart[1:].mean()), 5),
        "step_error": round(step_error(sampling.denoiser(pipe), original.calls), 5),
        "bytes": size,
        "minutes": round(minutes, 2),
    }


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(options))


def spread(values: Iterable[float], digits: int) -> str:
    """Mean, and how far seeds lie apart."""
    found = list(values)
    if len(found) == 1:
        return f"{found[0]:.{digits}f}"
    return f"{np.mean(found):.{digits}f} ± {np.std(found, ddof=1):.{digits}f}"


def rows(cells: Sequence[dict[str, Any]]) -> list[list[str]]:
    """One line for each width and method, best PSNR first."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["width"], cell["method"]), []).append(cell)
    widths = list(dict.fromkeys(cell["width"] for cell in cells))
    order = sorted(
        groups,
        key=lambda key: (widths.index(key[0]), -np.mean([cell["psnr"] for cell in groups[key]])),
    )
    return [[width, method, *figures(groups[width, method])] for width, method in order]


def figures(group: list[dict[str, Any]]) -> list[str]:
    return [
        str(len(group)),
        spread((cell["psnr"] for cell in group), 2),
        spread((cell["trajectory_error"] for cell in group), 4),
        spread((cell["step_error"] for cell in group), 4),
        f"{group[0]['bytes']:,}",
        f"{np.mean([cell['minutes'] for cell in group]):.1f}",
        ", ".join(sorted({cell["code"] for cell in group})),
    ]


HEAD = [
    "bits",
    "method",
    "seeds",
    "PSNR to float, dB",
    "trajectory error",
    "step error",
    "bytes on disk",
    "minutes",
    "code",
]
INTRO = (
    "Generated by `lowtide bench quality`; not written by hand. PSNR of same-seed samples to the float model's; trajectory "
    "error: relative L2 of the sample to the float run's, mean over steps; step error: relative L2 of one answer to the float "
    "model's for the same input, mean over steps. Each is the mean ± standard deviation over calibration seeds, as many as the "
    "column says. Code: a hash of the package that made a row, or words where none was noted; rows of different "
    "code are not of one bench."
)


def section(cells: Sequence[dict[str, Any]]) -> str:
    """What one model's cells were made with, and their table."""
    first = cells[0]
    settings = ", ".join(f"{name} {counted(value)}" for name, value in first["options"].items())
    made = f"{first['images']} images; settings: {settings or 'the defaults'}; float weights {first['weights'][:12]}."
    lines = lined([HEAD, ["---"] * len(HEAD), *rows(cells)])
    return "\n".join([f"## {first['model']}", "", made, "", *lines]) + "\n"


def lined(rows: Iterable[Sequence[str]]) -> list[str]:
    """Rows of a table in Markdown."""
    return ["| " + " | ".join(row) + " |" for row in rows]


def counted(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(text.optional(value))
    return f"({len(value)} of them)" if isinstance(value, list) else str(value)


def page(cells: Sequence[dict[str, Any]], before: str = "") -> str:
    """docs/results.md: this model's section in its place among those of other models."""
    parts = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in before.split("\n## ")[1:]}
    parts[cells[0]["model"]] = section(cells)
    return "\n".join(["# Results", "", INTRO, "", *parts.values()])
