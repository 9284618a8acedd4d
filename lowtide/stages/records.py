"""Records: tensors of finished work on disk, which a resumed run takes up again.

A record is written to a new file, forced to the disk, and renamed: a kill leaves a whole record, or
none. Its header holds a hash of all tensors. A damaged record is removed and made anew.
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowtide.kernels.hashing import hashes

HASH = "lowtide_record"


def write_record(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the tensors as one record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dense = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    fresh = path.with_suffix(".new")
    save_file(dense, fresh, metadata={HASH: hash_of(dense)})
    _force_to_disk(fresh)
    fresh.replace(path)
    _force_to_disk(path.parent)


def read_record(path: Path, say: Callable[[str], object]) -> dict[str, Tensor] | None:
    """The tensors of a record; None if there is none. One line says if it is damaged."""
    if not path.exists():
        return None
    tensors = _read(path)
    if tensors is None:
        say(f"{path.name} of the interrupted run is damaged; its work is done again")
        path.unlink()
    return tensors


def _read(path: Path) -> dict[str, Tensor] | None:
    """The tensors, if the file is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            written = (file.metadata() or {}).get(HASH)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError):
        return None
    return tensors if hash_of(tensors) == written else None


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.blake2b(digest_size=8)
    names = sorted(tensors)
    contents = hashes([tensors[name] for name in names], 8)
    for name, content in zip(names, contents, strict=True):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {content.hex()}\n".encode())
    return digest.hexdigest()


def _force_to_disk(path: Path) -> None:
    """Wait until the file, or the entries of the folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
