"""Conditions: what changes the bits of a run beside its settings. A resumed run keeps to them.

They stand in the run's folder from its first record. Whether products run in bf16 is decided by a
race, which a busy machine can turn, and sums depend on the number of threads: a resumed run takes
both from the folder. It cannot take the library, the device and the processor's instructions: it
stops with one sentence where these differ, before results are mixed.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lowtide.errors import BadInput
from lowtide.machine import bf16

FILE = "conditions.json"


@dataclass(frozen=True)
class Conditions:
    """The conditions of a run. `kernels` is the instruction set, or the name of the card."""

    bf16: bool
    threads: int
    torch: str
    device: str
    kernels: str


def present(device: torch.device, *, learns: bool = True) -> Conditions:
    """Those of this process. A run that learns nothing has no products that bf16 is raced for."""
    pays = learns and bf16.pays(device.type)
    return Conditions(bf16=pays, threads=torch.get_num_threads(), **_of_this_machine(device))


def _of_this_machine(device: torch.device) -> dict[str, str]:
    """The conditions that a resumed run cannot take from its folder."""
    if device.type == "cuda":
        kernels = torch.cuda.get_device_name(device)
    else:
        kernels = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "device": device.type, "kernels": kernels}


def kept_to(folder: Path | None, device: torch.device, *, learns: bool = True) -> Conditions:
    """The conditions of an interrupted run in this folder; those of this process without one."""
    begun = _read(folder / FILE) if folder else None
    if begun is None:
        return present(device, learns=learns)
    titles = {"torch": "torch", "device": "the device", "kernels": "the processor"}
    for name, here in _of_this_machine(device).items():
        title = titles[name]
        before = getattr(begun, name)
        if before != here:
            raise BadInput(
                f"found an interrupted run that began with {before} ({title}); here it is {here}",
                "the same, because other arithmetic gives other results",
                f"go on where it began, or remove {folder} to start anew",
            )
    return begun


@contextmanager
def applied(conditions: Conditions) -> Iterator[None]:
    """Within the context, torch computes with as many threads as the run began with."""
    before = torch.get_num_threads()
    torch.set_num_threads(conditions.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _read(path: Path) -> Conditions | None:
    """What the file says; None if there is none, or a kill cut it short."""
    try:
        return Conditions(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def keep(folder: Path, conditions: Conditions) -> None:
    """Write them into a run's folder, before its first record."""
    path = folder / FILE
    if _read(path) is not None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(conditions))


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a file that is whole after a kill, or not there."""
    fresh = path.with_suffix(".new")
    with fresh.open("w") as file:
        file.write(json.dumps(values, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)
