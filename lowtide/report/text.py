"""Results as lines of text for a terminal, and the bar of long work."""

import io
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

YEAR = 365 * 86_400
NAMED = 12
COLUMNS = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def track(things: Iterable[Any], total: int, title: str = "sampling") -> Iterator[Any]:
    """The things, behind a bar with the time left, on stderr."""
    console = Console(file=sys.stderr)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(things, total=total, description=title)


def size(count: float) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    lines = [head, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def quantized(result: dict[str, Any]) -> list[str]:
    seconds = [f"  {name:<14} {value:8.1f} s" for name, value in result["seconds"].items()]
    return [
        f"{result['model']} -> {result['folder']}: W{result['weights']}A{result['inputs']} by {result['method']}",
        f"{size(result['float_bytes'])} -> {size(result['on_disk'])} on disk "
        f"({result['on_disk'] / result['float_bytes']:.3f}x), {result['minutes']} minutes, {result['timesteps']} timesteps",
        *seconds,
        *options(result),
        *against(result),
        *account(result["account"]),
        *temporal(result.get("temporal", {})),
        *(f"kernel: {kernel}: {count} layers" for kernel, count in result["kernels"].items()),
        f"left in float: {100 * result['float_share']:.1f} % of the parameters that are not biases",
        *left_in_float(result["float"]),
    ]


def temporal(told: dict[str, Any]) -> list[str]:
    """How much of time's features comes from a cache, and what the block and its caches take, which may be more than before."""
    lines = []
    if told.get("features"):
        share, before, after = told["cached_share"], told["bytes_before"], told["bytes_after"]
        lines += [f"temporal features cached: {100 * share:.0f} % of (t, block) pairs; {before:,} -> {after:,} bytes"]
    if told.get("by_request"):
        lines += [f"temporal features computed once a request, not cached: {told['by_request']}"]
    return lines


def options(result: dict[str, Any]) -> list[str]:
    """What was asked of single stages."""
    return [f"with {option}" for option in optional(result.get("options", {}))]


def optional(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Options of stages as --set takes them."""
    return [f"{stage}.{name}={value}" for stage, given in stages.items() for name, value in given.items()]


def rescheduled(result: dict[str, Any]) -> list[str]:
    """From which schedule to which, and what was made anew."""
    return [
        f"{result['model']} -> {result['folder']}: {result['from']} steps -> {result['steps']}",
        f"{size(result['on_disk'])} on disk",
        f"cached features made anew at {len(result['timesteps'])} timesteps: {result['features']}",
        f"ranges from the nearest calibrated timestep, at most {result['farthest']:g} away",
    ]


def against(result: dict[str, Any]) -> list[str]:
    """What was predicted before the run, beside what it came to."""
    if "predicted" not in result:
        return []
    predicted = result["predicted"]
    rows = [
        ["size on disk", size(predicted["on_disk"]), size(result["on_disk"])],
        ["peak memory", size(predicted["peak_bytes"]), size(result["peak_bytes"])],
        ["time", duration(60 * predicted["minutes"]), duration(60 * result["minutes"])],
    ]
    return table(["", "predicted", "real"], rows)


def duration(seconds: float) -> str:
    """In the unit a person would use."""
    for most, unit, name in ((120, 1, "s"), (7200, 60, "min"), (48 * 3600, 3600, "h"), (2 * YEAR, 86_400, "days")):
        if seconds < most:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds / YEAR:,.0f} years"


def estimated(result: dict[str, Any]) -> list[str]:
    """What `lowtide plan` says: a table of stages, then size, memory and time in words."""
    table = Table("stage", Column("time", justify="right"), Column("peak memory", justify="right"), box=SIMPLE_HEAD)
    for stage in result["stages"]:
        table.add_row(stage["name"], duration(stage["seconds"]), size(stage["peak_bytes"]))
    table.add_section()
    table.add_row("in all", duration(result["seconds"]), size(result["peak_bytes"]))
    return [
        f"{result['model']} to W{result['weights']}A{result['inputs']} by {result['method']}, before anything runs:",
        *fitting(result),
        *options(result),
        *rendered(table),
        f"checkpoint: {size(result['size']['total'])}, {result['size']['total'] / result['float_bytes']:.3f} of its "
        f"{size(result['float_bytes'])} in float32",
        *account({kind: count for kind, count in result["size"].items() if kind != "total"}),
        *(f"stays in float beside it: {name}, {size(count)}" for name, count in result["others"].items()),
        f"in memory: {size(result['memory']['weights'])} of weights, {size(result['memory']['calls'])} of recorded calls, "
        f"at most {size(result['memory']['tape'])} of tape (--memory)",
        "Memory is what comes on top of Python and its libraries; time is for this machine as busy as it is now.",
        *(f"no price is known for the stage {name}; it is counted as nothing" for name in result["unpriced"]),
    ]


def fitting(result: dict[str, Any]) -> list[str]:
    if "fit" not in result:
        return []
    tried = ", ".join(f"{bits} bits: {size(count)}" for bits, count in result["fit"]["tried"].items())
    return [f"--fit {size(result['fit']['limit'])} chose {result['fit']['weights']}-bit weights ({tried})"]


def rendered(table: Table) -> list[str]:
    """A table of rich as lines."""
    page = Console(file=io.StringIO(), width=100, color_system=None)
    page.print(table)
    return [line.rstrip() for line in page.file.getvalue().splitlines() if line.strip()]


def account(parts: dict[str, int]) -> list[str]:
    return ["bytes:", *(f"  {name:<14} {size(count):>12}" for name, count in parts.items())]


def left_in_float(left: dict[str, str]) -> list[str]:
    """What was not quantized and why, alike reasons together."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return ["left in float:", *(line for why, names in reasons.items() for line in named(why, names))]


def named(why: str, names: list[str]) -> list[str]:
    """A reason and whom it concerns; a large model has hundreds of norms."""
    more = [f"and {len(names) - NAMED} more, all in --json"] if len(names) > NAMED else []
    lines = textwrap.wrap(", ".join([*names[:NAMED], *more]), 120, break_long_words=False)
    return [f"  {why}: {len(names)}", *(f"    {line}" for line in lines)]


def inspected(result: dict[str, Any]) -> list[str]:
    units = [
        [one["kind"], one["name"], str(one["layers"]), f"{one['weights']:,}", ", ".join(one["reads"])] for one in result["units"]
    ]
    layers = [
        [
            one["name"],
            "x".join(map(str, one["shape"])),
            str(one["weights"]),
            str(one["inputs"]),
            "per step" if one["per_step"] else "",
        ]
        for one in result["layers"]
    ]
    return [
        f"{result['model']}: {result['architecture']}, {result['parameters']:,} parameters, "
        f"{len(result['timesteps'])} calibrated timesteps",
        "",
        *table(["unit", "name", "layers", "weights", "reads"], units),
        "",
        *table(["layer", "shape", "W", "A", "ranges"], layers),
        "",
        *account(result["account"]),
        *left_in_float(result["float"]),
    ]


def demonstrated(result: dict[str, Any]) -> list[str]:
    """A table for each model, where its picture and its report lie, and which models are not here."""
    lines = [line for act in result["acts"] for line in ["", f"{act['model']}, {act['minutes']:.1f} minutes", *performed(act)]]
    missing = (f"{name} is not here: it lies in the repository, not in the package" for name in result["missing"])
    return [*lines, *missing]


def performed(act: dict[str, Any]) -> list[str]:
    rows = [
        [
            one["name"],
            size(one["bytes"]),
            "" if one["psnr"] is None else f"{one['psnr']:.2f} dB",
            f"{one['seconds_per_step']:.4f}",
        ]
        for one in act["rows"]
    ]
    head = ["model", "size on disk", "PSNR to float", "seconds per step"]
    return [*table(head, rows), f"picture: {act['picture']}", f"report:  {act['report']}"]
