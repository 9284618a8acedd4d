"""The command `lowtide export`."""

from typing import Annotated, Literal

import typer

from lowtide.cli.options import Json, Out, show


def export(
    model: Annotated[str, typer.Argument(help="A folder that lowtide quantize wrote.")],
    to: Annotated[
        Literal["float", "openvino", "onnx", "comfyui"],
        typer.Option("--to", help="The runtime that the files are for; float is diffusers."),
    ],
    out: Out,
    reference: Annotated[
        str | None,
        typer.Option(help="The float model, for a checkpoint of one schedule and --to float."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a packed model as files of another runtime, and say what that loses."""
    from lowtide.exporting.targets import export as export_to_folder
    from lowtide.report import text

    result = export_to_folder(model, out, to=to, reference=reference).as_json()
    show(result, as_json, text.exported(result))
