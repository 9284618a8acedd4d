"""Plots as inline SVG: matplotlib draws them, the style sheet colours them for light and dark."""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import groupby
from textwrap import fill
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowtide.report.evidence import ErrorTable
from lowtide.report.palette import DASHES, LINE_WIDTH, PAGE
from lowtide.report.wording import figures, part_name

# Grey that darkens with the error; the page's filters give each grey its colour of a ramp.
ERROR_COLOURS = matplotlib.colormaps["gray_r"]
_LONGEST = 36
_WIDTHS = {"wide": 850, "narrow": 340}
_COLOUR = {name: light for name, (light, _) in PAGE.items()}
_STYLE: dict[Any, Any] = {
    "figure.dpi": 72,
    "font.size": 12.5,
    "lines.linewidth": LINE_WIDTH,
    "text.parse_math": False,
    "svg.fonttype": "none",
    **dict.fromkeys(("text.color", "axes.labelcolor"), _COLOUR["quiet"]),
    **dict.fromkeys(("xtick.color", "ytick.color"), _COLOUR["quiet"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _COLOUR["hair"]),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "left", "right")), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "xtick.minor.size": 6,
    "legend.frameon": False,
    "figure.constrained_layout.h_pad": 10 / 72,
}
_VARIABLES = {light: f"var(--{name})" for name, light in _COLOUR.items()}


@dataclass(frozen=True)
class Line:
    """The line of a model: its name, the number of its colour, and an error at each timestep."""

    name: str
    colour: int
    errors: np.ndarray


def plot(label: str, draw: Callable[[float], Figure]) -> Markup:
    """The plot twice, for a wide page and for a phone; the style sheet shows one of them."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # The browser has the letters that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        return Markup("").join(_svg(draw(width), label, room) for room, width in _WIDTHS.items())


def _svg(figure: Figure, label: str, room: str) -> Markup:
    """The figure as an element of the page: no header, no style sheet and no fixed colours."""
    stream = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": f"{room} {label}"}):
        figure.savefig(stream, format="svg", transparent=True)
    body = stream.getvalue().split("</defs>", 1)[1]
    body = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag[0]), body)
    width, height = figure.get_size_inches() * figure.dpi
    head = f'<svg class="{room}" role="img" aria-label="{escape(label)}"'
    return Markup(f'{head} viewBox="0 0 {width:g} {height:g}">{body}')


def _page_tag(tag: str) -> str:
    """Fonts are the page's, colours become variables, and no id is the same in two plots."""
    tag = re.sub(r"font-family: [^;\"]*", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)
    return re.sub(r' id="(image\w+|[\w.]+_\d+)"', "", tag)


def lines(
    width: float, lines: Sequence[Line], timesteps: Sequence[int], title: str, *, log: bool
) -> Figure:
    """One line for each model over the timesteps, from noise to image."""
    names = [fill(line.name, _LONGEST) for line in lines]
    columns = min(len(names), int(width / (8 * max(map(len, names)) + 60)) or 1)
    rows = sum(name.count("\n") + 1 for name in names) / columns
    figure = Figure(figsize=(width / 72, (380 + 18 * rows) / 72), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel("timestep, from noise to image", loc="right", labelpad=8)
    axes.grid(axis="y")
    for line in lines:
        colour = _COLOUR[f"s{line.colour}"]
        dashes = DASHES[line.colour - 1]
        style = (0, dashes) if dashes else "-"
        axes.plot(timesteps, line.errors, color=colour, linestyle=style)
    axes.set_xlim(timesteps[0], timesteps[-1])
    if log and any((line.errors > 0).any() for line in lines):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    _ticks(axes.yaxis)
    place = {"loc": "outside upper left", "alignment": "left", "title": title, "ncols": columns}
    figure.legend(axes.lines, names, labelcolor="linecolor", handlelength=2.4, **place)
    return figure


def _ticks(axis: Axis) -> None:
    """Round values; 3, or 2 and 5, stand between the decades of a short logarithmic scale."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        parts = (1,) if high > 300 * low else (1, 3) if high > 20 * low else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=parts, numticks=8))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick_text(value)))


def _tick_text(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else figures(value, 1)


def heat_maps(width: float, tables: Mapping[str, ErrorTable], what: str) -> Figure:
    """A map for each model and one colour scale for all of them."""
    counts = [len(table.timesteps) for table in tables.values()]
    heights = [min(400, max(140, 7 * count, 24 * min(12, count))) for count in counts]
    size = (width / 72, (sum(heights) + 60 * len(heights) + 70) / 72)
    figure = Figure(figsize=size, layout="constrained")
    every = figure.subplots(len(tables), height_ratios=heights, squeeze=False)[:, 0]
    norm = shared_norm(list(tables.values()))
    for axes, height, (name, table) in zip(every, heights, tables.items(), strict=True):
        style = {"color": _COLOUR["ink"], "fontsize": 14, "pad": 8}
        axes.set_title(fill(name, _LONGEST), loc="left", **style)
        axes.imshow(table.error.T, ERROR_COLOURS, norm, aspect="auto", interpolation="none")
        step = math.ceil(len(table.timesteps) * 18 / height)
        shown = range(0, len(table.timesteps), step)
        axes.set_yticks(shown, [str(table.timesteps[row]) for row in shown], fontsize=11.5)
        _name_parts(axes, table.names, width)
    place = {"location": "bottom", "anchor": (0, 0), "shrink": 240 / width, "aspect": 26}
    scale = figure.colorbar(every[0].images[0], ax=every, **place)
    scale.ax.set_title(f"{what}, log scale", loc="left", fontsize=12.5, pad=6)
    _ticks(scale.ax.xaxis)
    return figure


def shared_norm(tables: Sequence[ErrorTable]) -> LogNorm:
    """One scale for all models, at most five decades deep: a colour means the same everywhere."""
    errors = np.concatenate([table.error.ravel() for table in tables])
    errors = errors[np.isfinite(errors) & (errors > 0)]
    high = errors.max(initial=0.0) or 1.0
    low = max(errors.min(initial=high), high * 1e-5)
    return LogNorm(low if low < high * 0.99 else high / 10, high, clip=True)


def _name_parts(axes: Axes, names: Sequence[str], width: float) -> None:
    """Marks between the parts of the network; the name or number of each where there is room."""
    groups = [(part, len(list(group))) for part, group in groupby(map(part_name, names))]
    edges = np.cumsum([0, *(count for _, count in groups)]) - 0.5
    words = [_part_word(part, (width - 60) * count / len(names)) for part, count in groups]
    axes.set_xticks((edges[1:] + edges[:-1]) / 2, words, fontsize=11.5)
    axes.set_xticks(edges, minor=True)


def _part_word(part: str, room: float) -> str:
    words = (part, part.split()[-1])
    return next((word for word in words if 6.1 * len(word) + 4 <= room), "")
