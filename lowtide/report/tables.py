"""Tables for the terminal: one renderer for all of them."""

from collections.abc import Iterable, Sequence
from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

_UNBOUNDED = 10_000


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: bool = False,
    width: int | None = None,
    colour: bool = False,
) -> list[str]:
    """The lines of a table under a ruled head.

    right: align all columns but the first to the right. width: the most characters of a line;
    without it, columns are as wide as their widest cell. colour: for a terminal, not for a file.
    """
    grid = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    for place, text in enumerate(head):
        grid.add_column(text, justify="right" if right and place else "left")
    for row in rows:
        grid.add_row(*row)
    console = Console(
        file=StringIO(),
        width=width or _UNBOUNDED,
        force_terminal=colour,
        markup=False,
        emoji=False,
        highlight=False,
    )
    with console.capture() as capture:
        console.print(grid)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]
