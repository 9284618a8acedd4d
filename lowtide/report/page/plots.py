"""Plots as inline SVG: matplotlib draws them, the style sheet colours them for light and dark."""

import hashlib
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import groupby, pairwise
from operator import itemgetter
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

from lowtide.report.evidence import ErrorTable, LayerBits, Model
from lowtide.report.palette import PAGE, RAMPS
from lowtide.report.wording import brief, figures, size

FLOAT_BITS = 16
NAME_HEIGHT = 17
_WIDTHS = {"wide": 850, "narrow": 340}
_COLOUR = {name: light for name, (light, _) in PAGE.items()}
_DASHES = ("-", "-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (9, 3)), (0, (2, 2)))
_MARKERS = "oosD^vP"
_QUIET = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
_STYLE: dict[Any, Any] = {
    "figure.dpi": 72,
    "font.size": 12.5,
    "lines.linewidth": 2.2,
    "axes.axisbelow": True,
}
_STYLE |= {"text.parse_math": False, "svg.fonttype": "none", "svg.hashsalt": "lowtide"}
_STYLE |= dict.fromkeys(_QUIET, _COLOUR["quiet"])
_STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), _COLOUR["hair"])
_STYLE |= dict.fromkeys((f"axes.spines.{side}" for side in ("top", "left", "right")), False)
_STYLE |= dict.fromkeys((f"{axis}tick.major.size" for axis in "xy"), 0)
_VARIABLES = {light: f"var(--{name})" for name, light in _COLOUR.items()}


@dataclass(frozen=True)
class Series:
    """The curve or the point of a model: its name, the number of its colour, and its values."""

    name: str
    colour: int
    x: tuple[float, ...]
    y: Sequence[float] | np.ndarray
    interval: tuple[float, float] = (math.nan, math.nan)


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


def _field(width: float, right: float, titles: tuple[str, str]) -> tuple[Figure, Axes]:
    """One pair of axes, with the title of y above them and the title of x below."""
    figure = Figure(figsize=(width / 72, 390 / 72))
    across = width - 54 - right
    axes = _axes(figure, 54, 30, across, 310)
    axes.set_title(titles[1], loc="left", fontsize=12.5, pad=14, x=-50 / across)
    axes.set_xlabel(titles[0], loc="right", labelpad=8)
    axes.grid(axis="y")
    return figure, axes


def lines(width: float, series: Sequence[Series], title: str, *, log: bool) -> Figure:
    """One line for each model over the timesteps, from noise to image, named where it ends."""
    room = 7.8 * max(len(_short(line.name, width)) for line in series) + 16
    figure, axes = _field(width, room, ("timestep, from noise to image", title))
    for line in series:
        style = {"color": _COLOUR[f"s{line.colour}"], "linestyle": _DASHES[line.colour]}
        axes.plot(line.x, line.y, **style)
    axes.set_xlim(series[0].x[0], series[0].x[-1])
    positive = any(value > 0 for line in series for value in line.y)
    axes.set_yscale("log" if log and positive else "linear")
    if not log:
        axes.set_ylim(bottom=0)
    _ticks(axes.yaxis, _tick_text)
    _name(axes, series, width, math.inf)
    return figure


def _short(name: str, width: float) -> str:
    """The name, cut where it would take more than a third of the plot."""
    most = int(width / 21)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _tick_text(value: float) -> str:
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else figures(value, 1)


def _ticks(axis: Axis, write: Callable[[float], str]) -> None:
    """Round values; 3, or 2 and 5, stand between the decades of a short logarithmic scale."""
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        parts = (1,) if high > 300 * low else (1, 3) if high > 20 * low else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=parts, numticks=8))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))


def _name(axes: Axes, series: Sequence[Series], width: float, edge: float) -> None:
    """Each name beside its last point, left of `edge`; names that would overlap move down."""
    ends = [(line.x[-1], ([y for y in line.y if math.isfinite(y)] or [0])[-1]) for line in series]
    pixels = np.nan_to_num(axes.transData.transform(ends), neginf=axes.bbox.y0)
    below = math.inf
    for place in np.argsort(-pixels[:, 1], kind="stable"):
        line = series[place]
        x, y = pixels[place]
        below = min(y, below - NAME_HEIGHT)
        name = _short(line.name, width)
        left = x + 7 * len(name) > edge
        shift = (-10 if left else 10, below - y)
        style = {"color": _COLOUR[f"s{line.colour}"], "va": "center", "annotation_clip": False}
        style |= {"ha": "right" if left else "left"}
        axes.annotate(name, (x, y), shift, "figure pixels", "offset points", **style)


def pareto(width: float, points: Sequence[Series], reference: Model) -> Figure:
    """Size against PSNR. The reference has no PSNR to itself: a line stands at its size."""
    figure, axes = _field(width, 20, ("size on disk", "PSNR, dB"))
    sizes = [reference.bytes, *(point.x[0] for point in points)]
    axes.set_xscale("log" if max(sizes) > 4 * min(sizes) else "linear")
    axes.margins(x=0.1, y=0.14)
    for point in points:
        style = {"color": _COLOUR[f"s{point.colour}"], "markersize": 11, "markeredgewidth": 0}
        axes.plot(point.x, point.y, _MARKERS[point.colour], **style)
        axes.plot(point.x * 2, point.interval, color=style["color"], linewidth=1.6)
    axes.axvline(reference.bytes, color=_COLOUR["quiet"], linestyle=(0, (1, 2)))
    at = axes.get_xaxis_transform()
    right = reference.bytes == min(sizes)
    text = _short(reference.name, width)
    shift = (6 if right else -6, -12)
    name = axes.annotate(text, (reference.bytes, 1), shift, at, "offset points")
    name.set_horizontalalignment("left" if right else "right")
    _front(axes, sorted((point.x[0], point.y[0]) for point in points))
    _ticks(axes.xaxis, lambda count: brief(size(count)))
    _ticks(axes.yaxis, lambda decibel: brief(figures(decibel, 4)))
    _name(axes, points, width, axes.bbox.x1)
    return figure


def _front(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    """Shade below the models that no other model beats in both size and PSNR."""
    limits = {"xlim": axes.get_xlim(), "ylim": axes.get_ylim()}
    heights = np.maximum.accumulate([psnr for _, psnr in points])
    edges = [*(count for count, _ in points), limits["xlim"][1]]
    axes.stairs(heights, edges, fill=True, color=_COLOUR["ink"], alpha=0.05)
    axes.set(**limits)


def heat_maps(width: float, tables: Sequence[tuple[str, ErrorTable]], what: str) -> Figure:
    """A map for each model and one colour scale for all of them."""
    norm = shared_norm([table for _, table in tables])
    rows = [len(table.timesteps) for _, table in tables]
    heights = [min(400, max(140, 7 * count, 24 * min(12, count))) for count in rows]
    figure = Figure(figsize=(width / 72, (sum(heights) + 74 * len(heights) + 38) / 72))
    top = 26.0
    for (name, table), height, count in zip(tables, heights, rows, strict=True):
        axes = _axes(figure, 44, top, width - 48, height)
        axes.set_title(
            _short(name, 2 * width), loc="left", color=_COLOUR["ink"], fontsize=14, pad=8
        )
        _image(axes, table.error.T, norm)
        shown = range(0, count, math.ceil(count * 18 / height))
        labels = [str(table.timesteps[row]) for row in shown]
        axes.set_yticks([1 - (row + 0.5) / count for row in shown], labels, fontsize=11.5)
        _name_parts(axes, table.names, np.full(len(table.names), 1 / len(table.names)))
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
    _ticks(scale.xaxis, lambda value: figures(value, 1))


def part_name(name: str) -> str:
    """The part of the network that holds a layer or unit: down 1, mid, up 0, time, block 12."""
    if name.startswith(("temporal:", "time_")):
        return "time"
    match = re.match(r"([A-Za-z_]+?)(?:_?blocks?|s)?(?:\.(\d+))?(?:\.|$)", name)
    if not match:
        return name.split(".")[0]
    stem = match[1].replace("conv_", "").replace("_", " ")
    return f"{stem} {match[2]}" if match[2] else stem


def _name_parts(axes: Axes, layers: Sequence[str], widths: np.ndarray) -> None:
    """A line below each part of the network, and its name or number where there is room."""
    edges = [0.0]
    for part, group in groupby(zip(map(part_name, layers), widths, strict=True), itemgetter(0)):
        edges.append(edges[-1] + sum(width for _, width in group))
        room = axes.bbox.width * (edges[-1] - edges[-2])
        words = (part, part.split()[-1])
        name = next((word for word in words if 6.1 * len(word) + 4 <= room), "")
        middle = ((edges[-1] + edges[-2]) / 2, 0)
        style = {"ha": "center", "va": "top", "fontsize": 11.5}
        axes.annotate(name, middle, (0, -9), "axes fraction", "offset points", **style)
    gap = 1.5 / axes.bbox.width
    below = -5 / axes.bbox.height
    rules = [((left + gap, below), (right - gap, below)) for left, right in pairwise(edges)]
    style = {"colors": _COLOUR["quiet"], "linewidths": 1, "clip_on": False}
    axes.add_collection(LineCollection(rules, transform=axes.transAxes, **style), autolim=False)


def bits(width: float, layers: Sequence[LayerBits]) -> Figure:
    """A bar for each layer: as wide as its share of the parameters, as high as its bits."""
    widths = shares([layer.parameters for layer in layers])
    edges = np.array([0, *np.cumsum(widths)])
    weights = np.array([layer.weights for layer in layers])
    inputs = np.array([layer.inputs or np.nan for layer in layers])
    quantized = [count for count in (*weights, *inputs) if 0 < count < FLOAT_BITS]
    # Layers in float do not set the top, or four bits would be slivers.
    top = max(quantized, default=FLOAT_BITS)
    figure = Figure(figsize=(width / 72, 188 / 72))
    axes = _axes(figure, 32, 10, width - 36, 150)
    for chosen, colour in ((weights < FLOAT_BITS, "s1"), (weights >= FLOAT_BITS, "hair")):
        heights = np.where(chosen, np.minimum(weights, top), 0)
        axes.stairs(heights, edges, fill=True, color=_COLOUR[colour], linewidth=0)
    gaps = [0.7 if one.unit == other.unit else 2.2 for one, other in pairwise(layers)]
    axes.vlines(edges[1:-1], 0, top, color=_COLOUR["paper"], linewidth=gaps)
    marked = np.where(inputs < FLOAT_BITS, inputs, np.nan)
    axes.stairs(marked, edges, baseline=None, color=_COLOUR["s2"], linewidth=2)
    axes.set(xlim=(0, 1), ylim=(0, top * 1.02), xticks=[])
    axes.set_yticks([mark for mark in (2, 4, 8, 16) if mark <= top])
    axes.grid(axis="y")
    _name_parts(axes, [layer.name for layer in layers], widths)
    return figure


def shares(parameters: Sequence[int]) -> np.ndarray:
    """Parts of the axis in proportion, none too thin to be visible: (layers,)"""
    least = min(0.004, 0.5 / len(parameters))
    widths = np.maximum(np.array(parameters) / (sum(parameters) or 1), least)
    return widths / widths.sum()
