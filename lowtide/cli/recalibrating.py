"""The command `lowtide recalibrate`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import about
from lowtide.cli.places import on_device
from lowtide.machine.device_names import AUTO
from lowtide.settings import Device


def recalibrate(
    model: Annotated[Path, typer.Argument(help="A folder that lowtide quantize wrote.")],
    lora: Annotated[str, typer.Option("--lora", help="The LoRA: a file, a folder, or a hub id.")],
    out: Annotated[
        Path, typer.Option("--out", help="Where the result goes.", rich_help_panel="Output")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="The float model, to measure the mean error of the answer again."),
    ] = None,
    device: Annotated[str, about("device", Device)] = AUTO,
    as_json: Annotated[  # noqa: FBT002 - typer's form of an option
        bool,
        typer.Option(
            "--json", help="Print the result as one JSON object.", rich_help_panel="Output"
        ),
    ] = False,
) -> None:
    """Fuse a LoRA into a packed model and fit the input ranges to it; weights stay as they are."""
    from lowtide.checkpoint.recalibration import recalibrate_to_folder
    from lowtide.report import text

    result = recalibrate_to_folder(
        model, out, lora=lora, reference=reference, device=on_device(device)
    )
    print(json.dumps(result) if as_json else "\n".join(text.recalibrated(result)))
