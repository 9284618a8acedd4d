"""Every method at every width on one model, from the same calibration data and seeds: `lowtide bench quality MODEL`.

Each cell (method, bits, seed) is a small JSON file in the run folder, so that a killed bench goes on where it stopped; the
table is drawn from the cells alone.
"""

import json
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowtide import run, sample
from lowtide.errors import BadInput
from lowtide.methods import METHODS
from lowtide.metrics import psnr
from lowtide.plan import FORMAT_VERSION
from lowtide.report import text

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
    def name(self) -> str:
        return f"{self.title.replace(' ', '')}-{self.width}-{self.seed}"

    def bits(self) -> dict[str, int]:
        """W4A8 -> weights 4, inputs 8."""
        weights, _, inputs = self.width.removeprefix("W").partition("A")
        if not (weights.isdigit() and inputs.isdigit()):
            raise BadInput(f"found width {self.width!r}", "one such as W4A8", "check --widths")
        return {"weights": int(weights), "inputs": int(inputs)}


def grid(methods: str, widths: str, seeds: Sequence[int]) -> list[Cell]:
    """Cells of all methods (or those named, `tcaq-par` being tcaq without PAR) at all widths, in the order of the table."""
    asked = [name.strip().split("-") for name in methods.split(",") if name.strip()] or [[name] for name in METHODS]
    if unknown := [name for name, *_ in asked if name not in METHODS]:
        raise BadInput(f"found method {unknown[0]!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`")
    chosen = [width.strip().upper() for width in widths.split(",") if width.strip()] or WIDTHS
    cells = [Cell(name, width, seed, tuple(without)) for width in chosen for name, *without in asked for seed in seeds]
    for cell in cells:
        cell.bits()
    return cells


@dataclass(frozen=True)
class Drawn:
    """The images of a model, and where its trajectory stood at each step: calls x samples x values."""

    images: np.ndarray
    path: np.ndarray


def draw(pipe: Any, request: sample.Request) -> Drawn:
    """Sample, listening at the denoiser's door."""
    heard: list[sample.Moment] = []
    with sample.listening(sample.denoiser(pipe), heard, None):
        images = np.concatenate([sample.run_pipeline(pipe, batch) for batch in request.batches()])
    steps = max(moment.index for moment in heard) + 1
    first = next(iter(heard[0].arguments))
    path = np.stack([moment.arguments[first].flatten(1).float().numpy() for moment in heard[:steps]])
    return Drawn(images, path)


def quality(
    source: str, out: str | Path, cells: Sequence[Cell], options: dict[str, Any], images: int = 64
) -> list[dict[str, Any]]:
    """Make and measure every cell that is not there yet; hand back all of them."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    request = sample.Request(steps=options.get("steps", 50), seeds=tuple(range(images)), batch=images, **asked(options))
    pipe = sample.load_pipeline(source)
    weights = run.fingerprint(sample.denoiser(pipe))
    conditions = {"weights": weights, "images": images, "options": told(options), "format": FORMAT_VERSION}
    original: Drawn | None = None
    for cell in text.track(cells, len(cells), "methods x bits"):
        path = out / f"{cell.name}.json"
        if not (path.exists() and alike(json.loads(path.read_text()), conditions)):
            original = original or draw(pipe, request)
            path.write_text(json.dumps(measured(source, cell, options, request, original) | conditions, indent=1))
    return [json.loads((out / f"{cell.name}.json").read_text()) for cell in cells]


def alike(cell: dict[str, Any], conditions: dict[str, Any]) -> bool:
    """A cell of other weights, settings or file format says nothing here."""
    return all(cell.get(name) == value for name, value in conditions.items())


def kept(out: str | Path, like: dict[str, Any]) -> list[dict[str, Any]]:
    """Every finished cell that was made under the same conditions as this one, in the order of the widths."""
    conditions = {name: like[name] for name in ("weights", "images", "options", "format")}
    found = [cell for path in sorted(Path(out).glob("*.json")) if alike(cell := json.loads(path.read_text()), conditions)]
    place = {width: number for number, width in enumerate(WIDTHS)}
    return sorted(found, key=lambda cell: place.get(cell["width"], len(place)))


def asked(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("prompts", "labels", "guidance", "size") if name in options}


def measured(source: str, cell: Cell, options: dict[str, Any], request: sample.Request, original: Drawn) -> dict[str, Any]:
    """Quantize, sample with the same seeds, and compare with the float model."""
    pipe, started = sample.load_pipeline(source), time.perf_counter()
    chosen = options | cell.bits() | {"seed": cell.seed}
    result = run.quantize(pipe, method=cell.method, without=cell.without, **chosen)
    minutes = (time.perf_counter() - started) / 60
    with tempfile.TemporaryDirectory() as folder:
        size = run.on_disk(result.save(Path(folder) / "packed"))
    ours = draw(pipe, request)
    away = np.linalg.norm(ours.path - original.path, axis=(1, 2)) / np.linalg.norm(original.path, axis=(1, 2))
    return {
        "method": cell.title,
        "width": cell.width,
        "seed": cell.seed,
        "psnr": round(psnr(ours.images, original.images), 3),
        "trajectory_error": round(float(away[1:].mean()), 5),
        "bytes": size,
        "minutes": round(minutes, 2),
    }


def told(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("prompts", "labels")}


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
    order = sorted(groups, key=lambda key: (widths.index(key[0]), -np.mean([cell["psnr"] for cell in groups[key]])))
    return [[width, method, *figures(groups[width, method])] for width, method in order]


def figures(group: list[dict[str, Any]]) -> list[str]:
    return [
        str(len(group)),
        spread((cell["psnr"] for cell in group), 2),
        spread((cell["trajectory_error"] for cell in group), 4),
        f"{group[0]['bytes']:,}",
        f"{np.mean([cell['minutes'] for cell in group]):.1f}",
    ]


HEAD = ["bits", "method", "seeds", "PSNR to float, dB", "trajectory error", "bytes on disk", "minutes"]


def markdown(title: str, cells: Sequence[dict[str, Any]]) -> str:
    """The table of one model."""
    lines = [f"## {title}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows(cells))]) + "\n"


def page(source: str, cells: Sequence[dict[str, Any]]) -> str:
    """docs/results.md: the table, and what it was made with."""
    settings = ", ".join(f"{name} {value}" for name, value in cells[0]["options"].items())
    seeds = ", ".join(map(str, sorted({cell["seed"] for cell in cells})))
    return (
        "# Results\n\nGenerated by `lowtide bench quality`; not written by hand. PSNR of same-seed samples to the float model's "
        "(mean ± standard deviation over calibration seeds), trajectory error: relative L2 of the sample to the float run's, "
        f"mean over steps. {cells[0]['images']} images; calibration seeds of {seeds}, as many as the column says. "
        f"Settings: {settings or 'the defaults'}; float weights {cells[0]['weights'][:12]}.\n\n{markdown(source, cells)}"
    )
