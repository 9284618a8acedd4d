"""Results as tables for the terminal: what `lowtide` prints when it isn't asked for --json."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from lowtide.report.ink import ACCENT

Found = Mapping[str, Any]


def size(count: float) -> str:
    """Bytes as people read them, in steps of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def comparison(rows: Sequence[Found]) -> list[list[str]]:
    """The demo's rows as text, headings first: the table of the picture and of the terminal."""
    head = ["", "Size on disk", "PSNR to the original", "Seconds per step"]
    return [head] + [
        [row["name"], size(row["bytes"]), "–" if row["psnr"] is None else f"{row['psnr']:.1f} dB", f"{row['seconds_per_step']:.3f}"]
        for row in rows
    ]


def table(title: str, rows: Sequence[Sequence[Any]], *, numbers: Sequence[int] = ()) -> Table:
    """A table whose first row is its headings; the columns named in `numbers` stand flush right."""
    drawn = Table(title=title, title_justify="left", title_style=f"bold {ACCENT}", box=None, pad_edge=False, header_style="dim")
    for number, heading in enumerate(rows[0]):
        drawn.add_column(heading, justify="right" if number in numbers else "left", overflow="fold")
    for row in rows[1:]:
        drawn.add_row(*map(str, row))
    return drawn


def units(found: Found) -> Table:
    rows = [
        (unit["name"], unit["kind"], len(unit["layers"]), ", ".join(unit["reads"]), f"{unit['weights']:,}")
        for unit in found["units"]
    ]
    return table("Units, in forward order", [("name", "kind", "layers", "reads", "weights"), *rows], numbers=(2, 4))


def layers(found: Found) -> Table:
    rows = [
        (layer["name"], layer["kind"], " x ".join(map(str, layer["shape"])), layer["bits"], layer["inputs"], size(layer["bytes"]))
        for layer in found["layers"]
    ]
    return table("Layers", [("name", "kind", "shape", "bits", "inputs", "bytes"), *rows], numbers=(3, 4, 5))


def left_in_float(found: Found) -> Table:
    rows = [(left["name"], left["why"], f"{left['share']:.2%}") for left in found["float"]]
    return table("Left in float", [("name", "why", "share of weights"), *rows], numbers=(2,))


def account(found: Found) -> Table:
    """Where the bytes go; shares are of the total."""
    total = found["account"].get("total") or 1
    rows = [(name.replace("_", " "), size(count), f"{count / total:.1%}") for name, count in found["account"].items()]
    return table("Bytes", [("part", "size", "share"), *rows], numbers=(1, 2))


def inspection(found: Found) -> list[Any]:
    head = f"{found['model']}: {found['architecture']}, {found['parameters']:,} parameters"
    leftovers = [left_in_float(found)] if found["float"] else []
    return [head, units(found), layers(found), *leftovers, account(found)]


def methods(found: Found) -> list[Any]:
    first = found["methods"][0]
    return [table("Methods", [tuple(first), *(tuple(method.values()) for method in found["methods"])])]


def demo(found: Found) -> list[Any]:
    rows = comparison(found["rows"])
    return [table("The same seeds, three models", rows, numbers=range(1, len(rows[0]))), f"The picture: {found['picture']}"]


def facts(found: Found) -> list[Any]:
    return [table("Done", [("", ""), *flat(found)])]


def flat(found: Found, prefix: str = "") -> list[tuple[str, str]]:
    """Nested results as name.name rows; long lists are counted, not printed."""
    rows: list[tuple[str, str]] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            rows += flat(value, f"{prefix}{name}.")
        else:
            rows.append((f"{prefix}{name}", brief(value)))
    return rows


def brief(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) > 8:
        return f"{len(value)} of them, {value[0]} to {value[-1]}" if isinstance(value[0], int | float | str) else f"{len(value)} of them"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


VIEWS = {"inspect": inspection, "methods": methods, "demo": demo, "facts": facts}


def show(view: str, found: Found) -> None:
    """Print a result on stdout, with a blank line between its parts."""
    console = Console(highlight=False)
    for number, part in enumerate(VIEWS[view](found)):
        console.print(*([""] if number else []), part, sep="\n")
