"""Plots as inline SVG: matplotlib draws them, the style sheet colours them for light and dark."""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import groupby
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from lowtide.report.evidence import ErrorTable
from lowtide.report.palette import PAGE, RAMPS
from lowtide.report.wording import figures, part_name

NAME_HEIGHT = 17
_WIDTHS = {"wide": 850, "narrow": 340}
_COLOUR = {name: light for name, (light, _) in PAGE.items()}
_DASHES = ("-", "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (2, 2)))
_STYLE: dict[Any, Any] = {
    "figure.dpi": 72,
    "font.size": 12.5,
    "lines.linewidth": 2.2,
    "axes.axisbelow": True,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "lowtide",
    **dict.fromkeys(("text.color", "axes.labelcolor"), _COLOUR["quiet"]),
    **dict.fromkeys(("xtick.labelcolor", "ytick.labelcolor"), _COLOUR["quiet"]),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), _COLOUR["hair"]),
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "left", "right")), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
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
    absent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=absent)
    body = stream.getvalue().split("</defs>", 1)[1]
    prefix = hashlib.sha256(f"{room} {label} {body}".encode()).hexdigest()[:6]
    body = re.sub(r"<[^>]+>", lambda tag: _page_tag(tag[0], prefix), body)
    width, height = figure.get_size_inches() * figure.dpi
    head = f'<svg class="{room}" role="img" aria-label="{escape(label)}"'
    return Markup(f'{head} viewBox="0 0 {width:g} {height:g}">{body}')


def _page_tag(tag: str, prefix: str) -> str:
    """Colours become variables, ids unique on the page, and themed images get a class."""
    tag = re.sub(r"\s+", " ", tag).replace("base64, ", "base64,")
    tag = re.sub(r"font-family: [^;\"]*", "", tag)
    tag = re.sub(r"#[0-9a-f]{6}\b", lambda colour: _VARIABLES.get(colour[0], colour[0]), tag)
    tag = re.sub(r' id="(light|dark)"', r' class="\1"', tag)
    return re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", tag)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place in pixels from the upper left corner."""
    across, down = figure.get_size_inches() * figure.dpi
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    return figure.add_axes(box)


def lines(
    width: float, lines: Sequence[Line], timesteps: Sequence[int], title: str, *, log: bool
) -> Figure:
    """One line for each model over the timesteps, from noise to image, named where it ends."""
    figure = Figure(figsize=(width / 72, 390 / 72))
    room = 7.8 * max(len(_short(line.name, width)) for line in lines) + 16
    across = width - 54 - room
    axes = _axes(figure, 54, 30, across, 310)
    axes.set_title(title, loc="left", fontsize=12.5, pad=14, x=-50 / across)
    axes.set_xlabel("timestep, from noise to image", loc="right", labelpad=8)
    axes.grid(axis="y")
    for line in lines:
        style = {"color": _COLOUR[f"s{line.colour}"], "linestyle": _DASHES[line.colour]}
        axes.plot(timesteps, line.errors, **style)
    axes.set_xlim(timesteps[0], timesteps[-1])
    if log and any((line.errors > 0).any() for line in lines):
        axes.set_yscale("log")
    if not log:
        axes.set_ylim(bottom=0)
    _ticks(axes.yaxis)
    _name(axes, lines, width)
    return figure


def _short(name: str, width: float) -> str:
    """The name, cut where it would take more than a third of the plot."""
    most = int(width / 21)
    return name if len(name) <= most else f"{name[: most - 1]}…"


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


def _name(axes: Axes, lines: Sequence[Line], width: float) -> None:
    """Each name beside its last point; names that would overlap move down."""
    ends = [(axes.get_xlim()[1], [0, *line.errors[np.isfinite(line.errors)]][-1]) for line in lines]
    pixels = np.nan_to_num(axes.transData.transform(ends), neginf=axes.bbox.y0)
    below = math.inf
    for place in np.argsort(-pixels[:, 1], kind="stable"):
        x, y = pixels[place]
        below = min(y, below - NAME_HEIGHT)
        style: dict[str, Any] = {"color": _COLOUR[f"s{lines[place].colour}"], "va": "center"}
        style |= {"xycoords": "figure pixels", "textcoords": "offset points"}
        text = _short(lines[place].name, width)
        axes.annotate(text, (x, y), (10, below - y), annotation_clip=False, **style)


def heat_maps(width: float, tables: Mapping[str, ErrorTable], what: str) -> Figure:
    """A map for each model and one colour scale for all of them."""
    norm = shared_norm(list(tables.values()))
    rows = [len(table.timesteps) for table in tables.values()]
    heights = [min(400, max(140, 7 * count, 24 * min(12, count))) for count in rows]
    figure = Figure(figsize=(width / 72, (sum(heights) + 74 * len(heights) + 38) / 72))
    top = 26.0
    for (name, table), height, count in zip(tables.items(), heights, rows, strict=True):
        axes = _axes(figure, 44, top, width - 48, height)
        style = {"color": _COLOUR["ink"], "fontsize": 14, "pad": 8}
        axes.set_title(_short(name, 2 * width), loc="left", **style)
        _image(axes, table.error.T, norm)
        shown = range(0, count, math.ceil(count * 18 / height))
        labels = [str(table.timesteps[row]) for row in shown]
        axes.set_yticks([1 - (row + 0.5) / count for row in shown], labels, fontsize=11.5)
        _name_parts(axes, table.names)
        top += height + 74
    _legend(_axes(figure, 44, top - 16, min(280, width - 64), 9), norm, what)
    return figure


def shared_norm(tables: Sequence[ErrorTable]) -> LogNorm:
    """One scale for all models, at most five decades deep: a colour means the same everywhere."""
    errors = np.concatenate([table.error.ravel() for table in tables])
    errors = errors[np.isfinite(errors) & (errors > 0)]
    high = errors.max(initial=0.0) or 1.0
    low = max(errors.min(initial=high), high * 1e-5)
    return LogNorm(low if low < high * 0.99 else high / 10, high, clip=True)


def _image(axes: Axes, error: np.ndarray, norm: LogNorm) -> None:
    """The cells for light and for dark paper; the style sheet shows one of the two images."""
    for theme in RAMPS:
        pixels = heat_pixels(error, norm, theme)
        box = {"aspect": "auto", "extent": (0, 1, 0, 1)}
        axes.imshow(pixels, interpolation="none", gid=theme, **box)
    axes.spines.bottom.set_visible(False)
    axes.set(xticks=[], yticks=[])


def heat_pixels(error: np.ndarray, norm: LogNorm, theme: str) -> np.ndarray:
    """(rows, columns) -> RGBA, (rows, columns, 4); what is not a number is transparent."""
    ramp = LinearSegmentedColormap.from_list(theme, RAMPS[theme])
    known = np.isfinite(error)
    pixels = ramp(norm(np.where(known, error, 0.0)), bytes=True)
    return pixels * known[..., None].astype(np.uint8)


def _legend(axes: Axes, norm: LogNorm, what: str) -> None:
    limits = (norm.vmin or 1, norm.vmax or 1)
    _image(axes, np.geomspace(*limits, 128)[None], norm)
    scale = axes.twiny()
    scale.set(xscale="log", xlim=limits)
    scale.xaxis.tick_bottom()
    scale.set_title(f"{what}, log scale", loc="left", fontsize=12.5, pad=6)
    scale.spines.bottom.set_visible(False)
    _ticks(scale.xaxis)


def _name_parts(axes: Axes, names: Sequence[str]) -> None:
    """A line below each part of the network, and its name or number where there is room."""
    column = 1 / len(names)
    gap = 1.5 / axes.bbox.width
    below = -5 / axes.bbox.height
    left = 0.0
    rules = []
    for part, group in groupby(map(part_name, names)):
        right = left + column * len(list(group))
        rules.append(((left + gap, below), (right - gap, below)))
        room = axes.bbox.width * (right - left)
        words = (part, part.split()[-1])
        word = next((word for word in words if 6.1 * len(word) + 4 <= room), "")
        place = ((left + right) / 2, 0)
        style = {"ha": "center", "va": "top", "fontsize": 11.5}
        axes.annotate(word, place, (0, -9), "axes fraction", "offset points", **style)
        left = right
    style = {"colors": _COLOUR["quiet"], "linewidths": 1, "clip_on": False}
    axes.add_collection(LineCollection(rules, transform=axes.transAxes, **style), autolim=False)
