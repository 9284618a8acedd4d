"""The command `lowtide recalibrate`."""

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Device, Json, Out, show
from lowtide.cli.places import on_device
from lowtide.machine.device_names import AUTO


def recalibrate(
    model: Annotated[Path, typer.Argument(help="A folder that lowtide quantize wrote.")],
    lora: Annotated[str, typer.Option("--lora", help="The LoRA: a file, a folder, or a hub id.")],
    out: Out,
    reference: Annotated[
        str | None,
        typer.Option(help="The float model, to measure the mean error of the answer again."),
    ] = None,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Fuse a LoRA into a packed model and fit the input ranges to it; weights stay as they are."""
    from lowtide.checkpoint.recalibration import recalibrate_to_folder
    from lowtide.report import text

    result = recalibrate_to_folder(
        model, out, lora=lora, reference=reference, device=on_device(device)
    )
    show(result, as_json, text.recalibrated(result))
