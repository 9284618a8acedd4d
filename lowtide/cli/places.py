"""Where a command computes: on which device, and in how many processes."""

import sys

from lowtide.distributed.launch import launched
from lowtide.errors import BadInput

# Commands that write a result and share nothing out.
ONE_PROCESS = ("reschedule", "recalibrate", "convert", "bench", "demo", "serve")


def on_device(device: str) -> str:
    """The device, once it is known to be there; the first line on stderr says which it is."""
    from lowtide.distributed.world import join
    from lowtide.machine import devices

    join()
    place = devices.chosen(device)
    others = f", and {launched().size - 1} more like it" if launched().several else ""
    print(f"device: {devices.describe(place)}{others}", file=sys.stderr)
    return place.type if launched().several else str(place)


def check_one_process(command: str | None) -> None:
    """Raise where torchrun starts a command that several processes would do at once."""
    if launched().several and command in ONE_PROCESS:
        raise BadInput(
            f"found lowtide {command} under torchrun",
            "quantize, run, sample, evaluate or compare, which share their work out",
            "call it without torchrun",
        )
