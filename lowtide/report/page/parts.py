"""What a section of the page consists of: tables of cells, and plots."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True)
class Cell:
    """A text, and what stands small below it. `bar`: start and length, as shares of the width."""

    text: str
    small: str = ""
    strong: bool = False
    bad: bool = False
    bar: tuple[float, float] | None = None
    colour: int | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells or texts, the first of each row its name; `folded` tables open on request."""

    label: str
    head: Sequence[Cell | str]
    rows: Sequence[Sequence[Cell | str]]
    folded: bool = True


@dataclass(frozen=True)
class Plot:
    """A plot with what to say above and below it."""

    svg: Markup
    title: str = ""
    note: str = ""
