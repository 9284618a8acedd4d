"""What the page consists of: cells and tables, the swatches of lines, the ramps of heat maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle, pairwise

from lowtide.report.palette import LINE_WIDTH
from lowtide.report.wording import NOTHING


def channels(ramp: Sequence[str]) -> dict[str, str]:
    """Red, green and blue along a ramp, from 0 to 1, for grey that darkens towards its end."""
    colours = [bytes.fromhex(colour[1:]) for colour in reversed(ramp)]
    columns = zip("RGB", zip(*colours, strict=True), strict=True)
    return {name: " ".join(f"{value / 255:.3f}" for value in column) for name, column in columns}


@dataclass(frozen=True)
class Cell:
    """A text, and what stands small below it. `bar`: start and length, as shares of the width."""

    text: str = NOTHING
    small: str = ""
    strong: bool = False
    bad: bool = False
    bar: tuple[float, float] | None = None
    colour: int | None = None


def swatch(dashes: Sequence[float]) -> str:
    """A CSS background in --colour with the dashes of a plot's line."""
    if not dashes:
        return "var(--colour)"
    edges = [f"{LINE_WIDTH * edge:g}px" for edge in accumulate(dashes, initial=0)]
    colours = cycle(("var(--colour)", "transparent"))
    ends = zip(colours, pairwise(edges), strict=False)
    stops = [f"{colour} {start} {end}" for colour, (start, end) in ends]
    return f"repeating-linear-gradient(90deg, {', '.join(stops)})"


@dataclass(frozen=True)
class Table:
    """Rows of cells or texts, the first of each row its name; `folded` tables open on request."""

    label: str
    head: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    folded: bool = True
