"""A plot of numbers along the sampling steps: one line per series, named where it ends."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowtide.report.palette import ACCENT, HAIR, INK, QUIET, SERIES

Series = Mapping[str, Sequence[float]]


def lines(
    path: str | Path,
    series: Series,
    x: Sequence[float],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    log: bool = False,
) -> Path:
    """Draw the plot; the timestep axis runs the way `x` does, so noise to image if x falls."""
    figure = Figure(figsize=(9, 5), dpi=200)
    figure.set_layout_engine("constrained", w_pad=0.25, h_pad=0.25)
    axes = figure.add_subplot()
    _draw(axes, series, x)
    _dress(axes, xlabel, ylabel, title)
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    if len(x) > 1:
        axes.set_xlim(x[0], x[-1])
    return _written(figure, Path(path))


def _written(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    try:
        figure.savefig(fresh, format="png")
        return fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


def _draw(axes: Axes, series: Series, x: Sequence[float]) -> None:
    """Each line has its name at its end, in its colour; the last line has the accent colour."""
    for number, (name, values) in enumerate(series.items()):
        colour = ACCENT if number == len(series) - 1 else SERIES[number % len(SERIES)]
        axes.plot(x, values, color=colour, linewidth=1.8, solid_capstyle="round")
        style = {"color": colour, "va": "center", "fontsize": 9, "annotation_clip": False}
        axes.annotate(name, (x[-1], values[-1]), (8, 0), "data", "offset points", **style)


def _dress(axes: Axes, xlabel: str, ylabel: str, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", color=INK, pad=16)
    axes.set_xlabel(xlabel, color=QUIET, fontsize=10, labelpad=8)
    axes.set_ylabel(ylabel, color=QUIET, fontsize=10, labelpad=8)
    axes.tick_params(colors=QUIET, labelsize=9, length=0, pad=6)
    axes.grid(axis="y", color=HAIR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(HAIR)
