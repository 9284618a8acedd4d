"""The command `lowtide demo`."""

from pathlib import Path
from typing import Annotated

import typer

from lowtide.cli.options import Device, Json, Out, show
from lowtide.cli.places import on_device
from lowtide.machine.device_names import AUTO


def demo(
    out: Out = Path("demo"),
    iters: Annotated[int, typer.Option(help="Rounding iterations per block.", min=1)] = 100,
    device: Device = AUTO,
    as_json: Json = False,
) -> None:
    """Quantize the zoo's digits and emoji with minmax, tfmq and best, and draw what was lost."""
    from lowtide.report import text
    from lowtide.workflows.demo import demo as run_demo

    result = run_demo(out, iters=iters, device=on_device(device))
    show(result, as_json, text.demonstrated(result))
