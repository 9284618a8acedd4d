"""The progress bar of long work: a line on stderr with the time left."""

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowtide.distributed.launch import launched

Item = TypeVar("Item")
COLUMNS = (
    TextColumn("{task.description:<24}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeRemainingColumn(),
)


def track(
    items: Iterable[Item], *, total: int | None, title: str, console: Console | None = None
) -> Iterator[Item]:
    """Yield the items and show how many are done; a console that is no terminal shows nothing.

    Of the processes of torchrun, the first one shows it.

    total: the number of items; None takes the length of `items`. console: stderr by default.
    """
    console = console or Console(file=sys.stderr)
    disable = not (console.is_terminal and launched().first)
    with Progress(*COLUMNS, console=console, transient=True, disable=disable) as progress:
        yield from progress.track(items, total=total, description=title)
