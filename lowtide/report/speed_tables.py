"""The speed of a model for readers: tables for the terminal, and the picture of where time goes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowtide.report.kinds_of_work import KINDS
from lowtide.report.palette import ACCENT, HAIR, INK, PAPER, QUIET, SERIES
from lowtide.report.tables import table
from lowtide.report.wording import (
    NOTHING,
    counted,
    lasting,
    percent,
    seconds,
    size,
    times,
)

Result = Mapping[str, Any]
HEAD = [
    "", "CPU a step", "wall", "x float", "x float, wall", "GOP/s", "outside", "memory", "load",
    "first step",
]  # fmt: skip
MOST_LAYERS = 40
GIGA = 1e9
_DPI = 200
_STYLE: dict[Any, Any] = {
    "font.size": 10.5,
    "font.family": "DejaVu Sans",
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color"), QUIET),
    "ytick.color": INK,
    "axes.edgecolor": HAIR,
    "grid.color": HAIR,
    **dict.fromkeys((f"axes.spines.{side}" for side in ("top", "left", "right")), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "legend.frameon": False,
}


def lines(result: Result) -> list[str]:
    """All tables of `lowtide bench speed`, and what its columns say."""
    return [
        _conditions(result),
        "",
        *table(HEAD, map(_row, result["rows"]), right=True),
        *_visits(result),
        "",
        *_meaning(result),
        "",
        *table(["time by kind", "float", "", "packed", ""], _kinds(result["kinds"]), right=True),
        "",
        *_layers(result["layers"]),
        *_torch_calls(result["torch"]),
        *(f"{note}." for note in result["notes"]),
    ]


def _conditions(result: Result) -> str:
    images = counted(result["batch"], "image")
    threads = counted(result["threads"], "thread")
    sets = result["sets"][0] if result["sets"] else "no native library"
    repeats = f"medians of {result['repeats']} steps in turns"
    return f"{result['model']}: {images} at once, {threads}, {repeats}, {sets}"


def _row(row: Result) -> list[str]:
    ratios = [row["ratio_cpu"], row["ratio_wall"]]
    return [
        row["name"],
        seconds(row["cpu"]),
        seconds(row["wall"]),
        *(NOTHING if ratio is None else f"{ratio:.2f}" for ratio in ratios),
        _rate(row["rate"]),
        NOTHING if row["outside"] is None else percent(row["outside"]),
        size(row["memory"]),
        lasting(row["load"]),
        lasting(row["until_first"]),
    ]


def _rate(rate: float | None) -> str:
    return NOTHING if rate is None else f"{rate / GIGA:.0f}"


def _visits(result: Result) -> list[str]:
    """Where a later visit of a timestep costs something else than the first."""
    return [
        f"{row['name']}: {seconds(row['cpu'])} at the first visit of a timestep, "
        f"{seconds(row['later']['cpu'])} at later ones, which have its temporal features."
        for row in result["rows"]
        if row["visits_differ"]
    ]


def _meaning(result: Result) -> list[str]:
    peak = f"{result['peak'] / GIGA:.0f}" if result["peak"] else "none measured"
    return [
        f"GOP/s: matrix products of layers, {result['operations'] / GIGA:.2f} GOP a step, in a "
        f"second of processor time; this machine's peak for int8, one thread: {peak}.",
        "outside: the share of time outside those products. memory: the most above Python and its "
        "libraries. first step: from the start of loading to the end of the first step.",
    ]


def _kinds(kinds: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """A row for each kind of work, and one for all."""
    packed = kinds["packed"]
    floating = kinds.get("float", {})
    rows = [[name, *_part(floating, name), *_part(packed, name)] for name in KINDS]
    return [*rows, ["in all", *_whole(floating), *_whole(packed)]]


def _part(kinds: Mapping[str, float], name: str) -> list[str]:
    if not kinds:
        return [NOTHING, ""]
    part = kinds.get(name, 0.0)
    return [seconds(part), percent(part / sum(kinds.values()))]


def _whole(kinds: Mapping[str, float]) -> list[str]:
    return [seconds(sum(kinds.values())), ""] if kinds else [NOTHING, ""]


def _layers(layers: Sequence[Result]) -> list[str]:
    """The layers that take most time, the slowest first."""
    longest = sorted(layers, key=lambda layer: -layer["seconds"])
    rows = [_layer(layer) for layer in longest[:MOST_LAYERS]]
    rest = len(layers) - len(rows)
    head = ["layer", "kernel", "rows x depth x columns", "time", "GOP/s", "why torch"]
    return [
        *table(head, rows),
        *([f"and {rest} more, all in --json"] if rest else []),
    ]


def _layer(layer: Result) -> list[str]:
    time = seconds(layer["seconds"])
    facts = [layer["name"], layer["kernel"], layer["shape"], time, _rate(layer["rate"])]
    return [*facts, layer["reason"]]


def _torch_calls(calls: Sequence[Result]) -> list[str]:
    if not calls:
        return []
    rows = [[call["name"], str(call["count"]), seconds(call["seconds"])] for call in calls]
    return ["", *table(["other calls of torch", "calls", "time"], rows)]


def picture(path: Path, result: Result) -> None:
    """Where the time goes: a bar for the float model and one for the packed one, by kind."""
    kinds = {name: result["kinds"][name] for name in ("float", "packed") if name in result["kinds"]}
    titles = {row["variant"]: row["name"] for row in result["rows"]}
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(9, 1.7 + 0.62 * len(kinds)), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        _bars(axes, kinds)
        labels = [
            f"{titles[name]}\n{seconds(sum(parts.values()))}" for name, parts in kinds.items()
        ]
        axes.set_yticks(range(len(kinds)), labels)
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("milliseconds of processor time a step", loc="right")
        figure.legend(loc="outside upper left", ncols=3, title=_headline(result), alignment="left")
        figure.savefig(path, facecolor=PAPER)


def _bars(axes: Axes, kinds: Mapping[str, Mapping[str, float]]) -> None:
    colours = (ACCENT, *SERIES)
    for place, name in enumerate(KINDS):
        widths = [1e3 * parts.get(name, 0.0) for parts in kinds.values()]
        lefts = [
            1e3 * math.fsum(parts.get(other, 0.0) for other in KINDS[:place])
            for parts in kinds.values()
        ]
        colour = colours[place % len(colours)]
        axes.barh(range(len(kinds)), widths, 0.62, lefts, color=colour, label=name)


def _headline(result: Result) -> str:
    name = Path(str(result["model"])).name
    packed = next(row for row in result["rows"] if row["variant"] == "packed")
    faster = f", {times(packed['ratio_cpu'])} as fast" if packed["ratio_cpu"] else ""
    images = counted(result["batch"], "image")
    return f"Where the time of a step goes: {name}, {images}{faster}"
