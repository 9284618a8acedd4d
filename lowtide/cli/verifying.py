"""The command `lowtide verify`."""

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Json, show


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that lowtide wrote.")],
    as_json: Json = False,
) -> None:
    """Whether a folder is as lowtide wrote it; exit code 1 and what is wrong if not."""
    from lowtide.checkpoint.verification import problems_of

    problems = problems_of(folder)
    whole = f"{folder} is whole: every file, tensor and configuration is as it was written"
    show({"folder": str(folder), "problems": problems}, as_json, problems or [whole])
    if problems:
        raise typer.Exit(1)
