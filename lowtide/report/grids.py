"""Grids of images, and the picture that sets several of them side by side above a table."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from lowtide.report.palette import ACCENT, HAIR, INK, PAPER, QUIET

_FONT = "DejaVu Sans"
_DPI = 200


@dataclass(frozen=True)
class Column:
    """One model's images with a heading and a line below it."""

    title: str
    subtitle: str
    images: np.ndarray


def pixels(images: np.ndarray) -> np.ndarray:
    return (np.clip(images, 0, 1) * 255).round().astype(np.uint8)


def grid(images: np.ndarray, gap: int = 1) -> np.ndarray:
    """Images (N, H, W, C) as one, as square as N allows, with a white line between them."""
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * (height + gap) + gap, columns * (width + gap) + gap, channels)
    sheet = np.full(shape, 255, np.uint8)
    for place, image in enumerate(pixels(images)):
        top = (place // columns) * (height + gap) + gap
        left = (place % columns) * (width + gap) + gap
        sheet[top : top + height, left : left + width] = image
    return np.repeat(sheet, 3, axis=2) if channels == 1 else sheet


def write_images(folder: Path, images: np.ndarray, seeds: Sequence[int]) -> None:
    """Write seed-000007.png for each image, and grid.png."""
    for image, seed in zip(pixels(images), seeds, strict=True):
        single = image.squeeze(2) if image.shape[2] == 1 else image
        Image.fromarray(single).save(folder / f"seed-{seed:06d}.png")
    Image.fromarray(grid(images)).save(folder / "grid.png")


def write_rows(path: Path, rows: Sequence[Sequence[Path]], most: int = 192, gap: int = 4) -> None:
    """Write rows of image files as one picture; each image has at most `most` pixels a side."""
    pictures = [_thumbnail(each, most) for each in chain.from_iterable(rows)]
    width = max(each.width for each in pictures) + gap
    height = max(each.height for each in pictures) + gap
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (width * columns + gap, height * len(rows) + gap), "white")
    for level, row in enumerate(rows):
        for place, image in enumerate(row):
            sheet.paste(_thumbnail(image, most), (place * width + gap, level * height + gap))
    sheet.save(path, format="png")


def _thumbnail(path: Path, most: int) -> Image.Image:
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((most, most))
    return small


def draw(path: Path, title: str, columns: Sequence[Column], table: Sequence[Sequence[str]]) -> None:
    """The picture: a title, the grids side by side, and a table whose first row is its head."""
    width = 4.1 * len(columns) + 0.9
    height = 6.2 + 0.36 * len(table)
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=PAPER)
    _write(figure, 0.45 / width, 1 - 0.55 / height, title, size=17, color=INK, weight="bold")
    for place, column in enumerate(columns):
        left = (0.45 + 4.1 * place) / width
        box = (left, 1 - 5.65 / height, 3.8 / width, 3.8 / height)
        _draw_column(figure, column, box, 1 / height)
    _draw_table(figure, table, width, height)
    figure.savefig(path, facecolor=PAPER)


def _write(
    figure: Figure,
    x: float,
    y: float,
    text: str,
    *,
    size: float,
    color: str,
    weight: str = "normal",
) -> None:
    style = {"fontsize": size, "color": color, "weight": weight}
    figure.text(x, y, text, family=_FONT, va="center", fontdict=style)


def _draw_column(
    figure: Figure, column: Column, box: tuple[float, float, float, float], inch: float
) -> None:
    left, bottom, _, height = box
    top = bottom + height
    title = column.title
    _write(figure, left, top + 0.48 * inch, title, size=13, color=INK, weight="bold")
    _write(figure, left, top + 0.2 * inch, column.subtitle, size=10.5, color=QUIET)
    axes = figure.add_axes(box)
    axes.imshow(grid(column.images), interpolation="nearest", aspect="equal")
    axes.set_axis_off()


def _draw_table(
    figure: Figure, table: Sequence[Sequence[str]], width: float, height: float
) -> None:
    """Rows of text under hairlines; the last row, the best method, in the accent colour."""
    spans = np.linspace(0, 1, len(table[0]) + 1)[:-1]
    for number, row in enumerate(table):
        level = (0.36 * (len(table) - number) + 0.12) / height
        color = QUIET if number == 0 else ACCENT if number == len(table) - 1 else INK
        for place, cell in zip(spans, row, strict=True):
            x = (0.45 + place * (width - 0.9)) / width
            weight = "bold" if place == 0 else "normal"
            _write(figure, x, level, cell, size=11, color=color, weight=weight)
        if number < len(table) - 1:
            figure.add_artist(_rule(width, level - 0.18 / height))


def _rule(width: float, level: float) -> Line2D:
    ends = [0.45 / width, 1 - 0.45 / width]
    return Line2D(ends, [level, level], color=HAIR, linewidth=0.8)
