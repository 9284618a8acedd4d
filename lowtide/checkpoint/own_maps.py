"""The tensors of a checkpoint, each with a map of its own, so that one can go before the others.

safetensors maps a file as a whole: no byte is read before it is used, but all of them stay in
memory until the last tensor is gone. The kernels hold codes in another order. With a map of its
own, a tensor leaves memory as soon as its codes are arranged, and never are all codes there twice.
"""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowtide.checkpoint.headers import METADATA, header_of

MAPS = Path("/proc/self/maps")
SMALL = 1 << 16  # bytes of a tensor that is copied; a map takes whole pages


@dataclass(frozen=True)
class Span:
    """The bytes of a tensor in a file."""

    path: Path
    start: int
    count: int


def spans(paths: Iterable[str | Path]) -> dict[str, Span]:
    """Where the tensors of safetensors files are, by name."""
    found: dict[str, Span] = {}
    for path in map(Path, paths):
        length, header = header_of(path)
        header.pop(METADATA, None)
        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            found[name] = Span(path, 8 + length + start, end - start)
    return found


def with_own_maps(state: dict[str, Tensor], places: dict[str, Span]) -> dict[str, Tensor]:
    """The same tensors, none of which needs the map of the whole file.

    They stay as they are where they are not mapped: diffusers can read files instead, and the maps
    of a process are known on Linux only.
    """
    if not _are_mapped(state, places):
        return state
    for path in {places[name].path for name in state}:
        _read_ahead(path)
    return {name: _own(tensor, places[name]) for name, tensor in state.items()}


def _are_mapped(state: dict[str, Tensor], places: dict[str, Span]) -> bool:
    """Whether every tensor is in the file, and the largest one mapped from it."""
    if not MAPS.exists() or not state or not state.keys() <= places.keys():
        return False
    name = max(state, key=lambda name: state[name].nbytes)
    address = state[name].data_ptr()
    path = str(places[name].path.resolve())
    return any(
        line.rstrip().endswith(path) and _holds(line, address)
        for line in MAPS.read_text().splitlines()
    )


def _holds(line: str, address: int) -> bool:
    """Whether a line of the list of maps, START-END in hexadecimal first, has this address."""
    start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
    return start <= address < end


def _read_ahead(path: Path) -> None:
    """Ask the system to read the file in large pieces, as what follows reads it in small ones."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _own(tensor: Tensor, place: Span) -> Tensor:
    if tensor.nbytes < SMALL or place.count != tensor.nbytes:
        return tensor.clone()
    first = place.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    offset = place.start - first
    if offset % tensor.itemsize:
        return tensor.clone()
    with place.path.open("rb") as file:
        length = offset + place.count
        memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=first)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.reshape(tensor.shape)
