"""The demo: each zoo model beside its quantized versions, same seeds: picture, report, table."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lowtide import zoo
from lowtide.checkpoint import folders
from lowtide.evaluation import comparison
from lowtide.machine.device_names import AUTO
from lowtide.methods import relevant_options
from lowtide.report import grids
from lowtide.report.evidence import Model
from lowtide.workflows import to_folder

# Half the default calibration set and a tenth of its iterations, for a demo of four minutes.
SETTINGS = {"weights": 4, "inputs": 8, "images": 16}
ITERS = 100
PICTURE = "demo.png"
EVIDENCE = "evidence"


@dataclass(frozen=True)
class Act:
    """One model of the demo, and what it draws."""

    model: str
    title: str
    steps: int
    images: int
    methods: tuple[str, ...] = ("minmax", "best")
    prompts: tuple[str, ...] = ()
    guidance: float | None = None

    @property
    def name(self) -> str:
        return self.model.removeprefix("zoo:")


@dataclass(frozen=True)
class DemoRow:
    """What the picture's table says of one model. `psnr` is None for the original."""

    name: str
    bytes: int
    psnr: float | None
    seconds_per_step: float


ACTS = (
    Act("zoo:digits", "zoo:digits", steps=50, images=64, methods=("minmax", "tfmq", "best")),
    Act(
        "zoo:emoji", "zoo:emoji, text to image", steps=25, images=16, guidance=4.0,
        prompts=(
            "sleepy face", "cat face", "snowman", "heart",
            "rocket", "soccer ball", "tiger face", "hamburger",
            "sunflower", "octopus", "penguin", "butterfly",
            "crown", "strawberry", "airplane", "red apple",
        ),
    ),
)  # fmt: skip


def demo(
    out: Path, iters: int = ITERS, acts: Sequence[Act] = ACTS, device: str = AUTO
) -> dict[str, object]:
    """Quantize each act's model to W4A8 by its methods, and draw from the same seeds."""
    names = zoo.names()
    available = [act for act in acts if act.name in names]
    for act in available:
        _check_places(act, out / act.name)
    return {
        "acts": [_perform(act, out / act.name, iters, device) for act in available],
        "missing": [act.model for act in acts if act not in available],
    }


def _check_places(act: Act, out: Path) -> None:
    """Everything that the act writes has a place where lowtide may write."""
    for method in act.methods:
        folders.check_place(out / method)
    folders.check_place(out / EVIDENCE, folders.EVIDENCE_MARKS)
    folders.check_file(out / PICTURE)


def _perform(act: Act, out: Path, iters: int, device: str) -> dict[str, object]:
    """One model: a folder for each method, the evidence, the picture."""
    started = time.perf_counter()
    drawing = {"prompts": act.prompts, "guidance": act.guidance}
    for method in act.methods:
        options = SETTINGS | {"steps": act.steps, "iters": iters, "device": device} | drawing
        relevant = relevant_options(method, options)
        to_folder.quantize_to_folder(act.model, out / method, method, relevant)
    evaluation = comparison.compare(
        act.model,
        *(str(out / method) for method in act.methods),
        out=out / EVIDENCE,
        seeds=tuple(range(act.images)),
        steps=act.steps,
        batch=16,
        prompts=act.prompts,
        guidance=act.guidance,
        device=device,
    )
    evidence = evaluation.evidence
    rows = [_original(evidence.base), *map(_row, evidence.others.values())]
    title = f"{act.title}, at 4-bit weights and 8-bit inputs, {act.steps} steps, same seeds"
    with folders.written_file(out / PICTURE) as fresh:
        grids.draw(fresh, title, _columns(evaluation, rows), _table(rows))
    return {
        "model": act.model,
        "picture": str(out / PICTURE),
        "report": str(evaluation.report),
        "rows": [asdict(row) for row in rows],
        "minutes": round((time.perf_counter() - started) / 60, 2),
    }


def _original(model: Model) -> DemoRow:
    return DemoRow("Original", model.bytes, None, round(model.seconds_per_step, 4))


def _row(model: Model) -> DemoRow:
    return DemoRow(
        name=f"{model.method}, W4A8",
        bytes=model.bytes,
        psnr=round(model.psnr, 2),
        seconds_per_step=round(model.seconds_per_step, 4),
    )


def _columns(evaluation: comparison.Evaluation, rows: list[DemoRow]) -> list[grids.Column]:
    """A column for each row; the reference is the first model of the evidence."""
    folder = evaluation.folder / "images"
    return [
        grids.Column(row.name, _quality(row), _images(folder / key))
        for key, row in zip(evaluation.evidence.models, rows, strict=True)
    ]


def _images(folder: Path) -> np.ndarray:
    """The images of one model in the order of their seeds: (images, height, width, channels)."""
    paths = sorted(folder.glob("*.png"), key=lambda path: int(path.stem))
    images = [np.asarray(Image.open(path), np.float32) / 255 for path in paths]
    return np.stack([image if image.ndim == 3 else image[..., None] for image in images])


def _quality(row: DemoRow) -> str:
    return "the reference" if row.psnr is None else f"{row.psnr:.2f} dB to the original"


def _table(rows: list[DemoRow]) -> list[list[str]]:
    head = ["model", "size on disk", "PSNR to the original", "seconds per step of a batch"]
    return [head, *(_cells(row, rows[0]) for row in rows)]


def _cells(row: DemoRow, original: DemoRow) -> list[str]:
    size = f"{row.bytes / 1e6:.2f} MB ({row.bytes / original.bytes:.2f}x)"
    if row.psnr is None:
        return [row.name, size, "", f"{row.seconds_per_step:.3f}"]
    speedup = original.seconds_per_step / row.seconds_per_step
    seconds = f"{row.seconds_per_step:.3f} ({speedup:.1f}x as fast)"
    return [row.name, size, f"{row.psnr:.2f} dB", seconds]
