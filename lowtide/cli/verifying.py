"""The command `lowtide verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer


def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that lowtide wrote.")],
    as_json: Annotated[  # noqa: FBT002 - typer's form of an option
        bool,
        typer.Option(
            "--json", help="Print the result as one JSON object.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Whether a folder is as lowtide wrote it; exit code 1 and what is wrong if not."""
    from lowtide.checkpoint.verification import problems_of

    problems = problems_of(folder)
    lines = problems or [f"{folder} is whole: every file, tensor and configuration is as written"]
    print(
        json.dumps({"folder": str(folder), "problems": problems}) if as_json else "\n".join(lines)
    )
    if problems:
        raise typer.Exit(1)
