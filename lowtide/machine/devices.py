"""Which device computes: the one that a user names, or the accelerator that this machine has."""

import re

import torch

from lowtide.distributed.launch import launched
from lowtide.errors import BadInput
from lowtide.machine.device_names import AUTO, EXAMPLE, KINDS

CPU = torch.device("cpu")
# Apple's GPUs have no float64, in which some stages sum, and nothing was tried there yet. A user
# may still name one.
NOT_BY_ITSELF = ("mps",)


def chosen(name: str = AUTO) -> torch.device:
    """The device of that name, such as cuda or cuda:1; for "auto" the accelerator, or the CPU."""
    present = _accelerator()
    if name == AUTO:
        if present is None or present.type in NOT_BY_ITSELF:
            return CPU
        return torch.device(present.type, _own_index(present.type))
    kind, index = _parts(name, present)
    if kind == CPU.type:
        return CPU
    if present is None or present.type != kind:
        here = "cpu" if present is None else f"cpu or {present.type}"
        raise BadInput(
            f"found device {name!r}, and torch sees no {kind} on this machine",
            here,
            "leave --device away, or install a torch that knows this device",
        )
    if index is not None and launched().several:
        raise BadInput(
            f"found device {name!r} under torchrun",
            f"{kind}, of which each process takes the card of its number",
            f"give --device {kind}, or choose cards with CUDA_VISIBLE_DEVICES",
        )
    count = torch.accelerator.device_count()
    if index is not None and index >= count:
        cards = "1 card" if count == 1 else f"{count} cards"
        raise BadInput(
            f"found device {name!r} on a machine with {cards}",
            f"a number from 0 to {count - 1}" if count > 1 else f"{kind}:0",
            f"give --device {kind}",
        )
    return torch.device(kind, _own_index(kind) if index is None else index)


def check_own_card(device: torch.device) -> None:
    """Raise where a process of torchrun works on the card of another one."""
    if launched().several and device.type != CPU.type and device.index != _own_index(device.type):
        raise BadInput(
            f"found a model on {device} in process {launched().local_rank} of this machine",
            f"it on {device.type}:{launched().local_rank}, a card of its own",
            f"move it there with .to(f'{device.type}:{{LOCAL_RANK}}')",
        )


def _accelerator() -> torch.device | None:
    """The kind of accelerator that torch can use here."""
    return torch.accelerator.current_accelerator(check_available=True)


def _own_index(kind: str) -> int:
    """torch's current card; under torchrun, the card with the number of the process."""
    if not launched().several:
        return torch.accelerator.current_device_index()
    number = launched().local_rank
    count = torch.accelerator.device_count()
    if number >= count:
        raise BadInput(
            f"found process {number} on a machine with {count} of {kind}",
            f"at most {count} processes here",
            f"give torchrun --nproc-per-node {count}, or --device cpu",
        )
    return number


def _parts(name: str, present: torch.device | None) -> tuple[str, int | None]:
    """The kind and the number of a device; the CPU has no number."""
    match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", name, re.ASCII)
    kind = match[1] if match else ""
    number = match[2] if match else None
    known = (*KINDS, present.type) if present else KINDS
    if kind not in known or (kind == CPU.type and number is not None):
        raise BadInput(
            f"found device {name!r}",
            f"one of {AUTO}, {', '.join(known)}, or a number such as {EXAMPLE}",
            "correct --device",
        )
    return kind, None if number is None else int(number)


def describe(device: torch.device) -> str:
    """The device in words, such as "cuda:0 (NVIDIA H200)"."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{device} ({name})" if name else str(device)


def synchronize(device: torch.device) -> None:
    """Wait for all work on the device; the CPU's is done when a call returns."""
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type != CPU.type:
        torch.get_device_module(device).synchronize(device)


def moved_to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU; one that comes from a CUDA card is pinned, so that it returns fast."""
    if tensor.device.type != "cuda":
        return tensor.to(CPU)
    return torch.empty_like(tensor, device=CPU, pin_memory=True).copy_(tensor)


def empty_cache(device: torch.device) -> None:
    """Give memory that the allocator keeps, and no tensor uses, back to the device."""
    if device.type == "mps":
        torch.mps.empty_cache()
    elif device.type != CPU.type:
        torch.get_device_module(device).empty_cache()


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Bytes that are free on the device, and all of its bytes; None where torch cannot tell."""
    asked = getattr(torch.get_device_module(device), "mem_get_info", None)
    return asked(device) if asked and device.type != CPU.type else None
