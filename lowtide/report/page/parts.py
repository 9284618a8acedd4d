"""What a table of the page consists of."""

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.report.wording import NOTHING


@dataclass(frozen=True)
class Cell:
    """A text, and what stands small below it. `bar`: start and length, as shares of the width."""

    text: str = NOTHING
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
