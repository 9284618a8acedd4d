"""Tapes: what went into a unit and what came out, in memory up to a budget, on disk beyond it.

A tape is a list of batches. Whether a batch lies in memory or in a file is invisible to its reader; a file is gone as
soon as nothing refers to it.
"""

import tempfile
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lowtide.machine.peak_memory import give_back


class Store:
    """The budget that tapes share: bytes in memory now, and the folder where the rest goes."""

    def __init__(self, budget: int):
        self.budget, self.held = budget, 0
        self.folder = tempfile.TemporaryDirectory(prefix="lowtide-")
        self.count = 0

    def file(self) -> Path:
        self.count += 1
        return Path(self.folder.name) / f"{self.count}.bin"


class Tape:
    """Batches of one value, in order."""

    def __init__(self, store: Store):
        self.store = store
        self.batches: list[Tensor] = []

    def append(self, batch: Tensor) -> None:
        batch = batch.detach()
        size = batch.numel() * batch.element_size()
        if self.store.held + size > self.store.budget and size:
            self.batches.append(spilled(batch, self.store.file()))
            del batch
            give_back()
            return
        self.store.held += size
        held = batch.contiguous()
        weakref.finalize(held, release, self.store, size)
        self.batches.append(held)

    def __getitem__(self, index: int) -> Tensor:
        return self.batches[index]

    def __len__(self) -> int:
        return len(self.batches)


def release(store: Store, size: int) -> None:
    store.held -= size


def spilled(batch: Tensor, path: Path) -> Tensor:
    """The same values behind a map of a file, which the system may drop from memory; the file goes when the tensor does."""
    raw = batch.contiguous().cpu().flatten().view(torch.uint8).numpy()
    raw.tofile(path)
    mapped = torch.from_numpy(np.memmap(path, dtype=np.uint8, mode="r+"))
    path.unlink()
    return mapped.view(batch.dtype).reshape(batch.shape)
