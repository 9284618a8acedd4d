"""Tape: a list of batches of one value on the CPU, in memory up to a budget, on disk beyond it.

A reader does not see whether a batch is in memory or in a file. A file is deleted as soon as
nothing refers to it.
"""

import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.machine.devices import moved_to_cpu
from lowtide.machine.peak_memory import release_free_memory

EXPECTED = "room for the calibration data that is not held in memory"
WAY_OUT = (
    "set TMPDIR to a larger disk, or hold more in memory (--memory); a quantization with a folder "
    "for its parts goes on where it stopped"
)


class Store:
    """The budget of bytes in memory that tapes share, and the folder for the rest.

    held: bytes in memory now. count: batches written to disk so far.
    """

    def __init__(self, budget: int):
        self.budget = budget
        self.held = 0
        self.folder = _temporary_folder()
        self.count = 0

    def next_file(self) -> Path:
        """The path of a new file."""
        self.count += 1
        return Path(self.folder.name) / f"{self.count}.bin"


class Tape:
    """Batches of one value, in order."""

    def __init__(self, store: Store):
        self.store = store
        self.batches: list[Tensor] = []

    def append(self, batch: Tensor) -> None:
        """Add a batch, on the CPU; beyond the budget it goes to disk."""
        batch = moved_to_cpu(batch.detach())
        size = batch.numel() * batch.element_size()
        if self.store.held + size > self.store.budget and size:
            self.batches.append(_spilled(batch, self.store.next_file()))
            del batch
            release_free_memory()
            return
        self.store.held += size
        held = batch.contiguous()
        weakref.finalize(held, _release, self.store, size)
        self.batches.append(held)

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def _release(store: Store, size: int) -> None:
    store.held -= size


def _spilled(batch: Tensor, path: Path) -> Tensor:
    """The same values in a memory-mapped file, whose pages the system may drop from memory.

    The file is deleted with the tensor.
    """
    raw = batch.contiguous().flatten().view(torch.uint8).numpy()
    try:
        raw.tofile(path)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise _full(path.parent, raw.nbytes) from error
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
    path.unlink()
    return mapped.view(batch.dtype).reshape(batch.shape)


def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="lowtide-")
    except OSError as error:
        raise BadInput(
            f"found no temporary folder that can be written ({error.strerror})", EXPECTED, WAY_OUT
        ) from error


def _full(folder: Path, size: int) -> BadInput:
    left = shutil.disk_usage(folder).free
    return BadInput(
        f"found {left:,} bytes left in the temporary folder {folder.parent}",
        f"{EXPECTED} ({size:,} bytes for a part of it)",
        WAY_OUT,
    )
