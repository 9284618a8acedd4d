"""Results as lines of text for a terminal, and the bar of long work."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

COLUMNS = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


def track(things: Iterable[Any], total: int, title: str = "sampling") -> Iterator[Any]:
    """The things, behind a bar with the time left, on stderr."""
    console = Console(file=sys.stderr)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield from progress.track(things, total=total, description=title)


def size(count: float) -> str:
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
        *account(result["account"]),
        *(f"kernel: {kernel}: {count} layers" for kernel, count in result["kernels"].items()),
        f"left in float: {100 * result['float_share']:.1f} % of the parameters that are not biases",
        *left_in_float(result["float"]),
    ]


def account(parts: dict[str, int]) -> list[str]:
    return ["bytes:", *(f"  {name:<14} {size(count):>12}" for name, count in parts.items())]


def left_in_float(left: dict[str, str]) -> list[str]:
    """What was not quantized and why, alike reasons together."""
    reasons: dict[str, list[str]] = {}
    for name, why in left.items():
        reasons.setdefault(why, []).append(name)
    return [
        "left in float:",
        *(f"  {why}: {len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for why, names in reasons.items()),
    ]


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
    rows = [
        [
            one["name"],
            size(one["bytes"]),
            "" if one["psnr"] is None else f"{one['psnr']:.2f} dB",
            f"{one['seconds_per_step']:.4f}",
        ]
        for one in result["rows"]
    ]
    return [*table(["model", "size on disk", "PSNR to float", "seconds per step"], rows), "", f"picture: {result['picture']}"]
