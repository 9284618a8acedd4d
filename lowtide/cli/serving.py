"""The command `lowtide serve`."""

import sys
from typing import Annotated

import typer

from lowtide.cli.options import Device
from lowtide.cli.places import on_device
from lowtide.machine.device_names import AUTO


def serve(
    runs: Annotated[list[str], typer.Argument(help="Folders that lowtide quantize wrote.")],
    reference: Annotated[
        str | None, typer.Option(help="The float model to show beside them.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="The port; 0 takes a free one.", min=0, max=65535)
    ] = 8765,
    device: Device = AUTO,
) -> None:
    """Show quantized models beside the float model on a page: prompt, seed, steps, a slider."""
    from lowtide.workflows.exhibit import Exhibit
    from lowtide.workflows.exhibit_server import LOCAL, ExhibitServer

    exhibit = Exhibit(runs, reference=reference, device=on_device(device))
    with ExhibitServer(exhibit, host, port) as server:
        print(f"{server.address} shows {len(exhibit.models)} models; Ctrl-C ends it", flush=True)
        if host not in LOCAL:
            print("whoever reaches this address can draw images on this machine", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("the page is closed", file=sys.stderr)
