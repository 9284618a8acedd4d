"""The list of the files that lowtide wrote into a folder, with a hash of each.

A folder without a readable list is nobody's: lowtide removes nothing in it. The hash is of

    packed weights    the header, which holds a hash of each tensor
    large files       the hashes of their pieces, which threads take side by side
    others            all bytes
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import torch

from lowtide.kernels.hashing import hashes

MANIFEST = "lowtide-files.json"
VERSION = 3  # 1: a list of names without hashes; 2: no hashes of weights and of large files
LARGEST = 2**24  # bytes of a file that is hashed as a whole
PIECE = 2**20
SEALED = b"lowtide_plan"  # is in the header of packed weights
LONGEST = 100_000_000  # bytes of a header


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the list of these files, which stand in the folder."""
    _write(folder, {name: file_hash(folder / name) for name in names})


def add_listed(folder: Path, name: str, content: Path) -> None:
    """Add a file to the list. It stands at `content`, and gets its name afterwards."""
    _write(folder, (_read(folder) or {}) | {name: file_hash(content)})


def listed(folder: Path) -> frozenset[str]:
    """The files that lowtide wrote into a folder; none if there is no readable list."""
    hashes = _read(folder)
    return frozenset(hashes) | {MANIFEST} if hashes is not None else frozenset()


def altered(folder: Path, *, large: bool = True, within: str = "") -> list[str]:
    """The listed files that are missing, or whose bytes are not those that lowtide wrote.

    large: also of the files whose bytes take time. within: only those of this subfolder.
    """
    written_hashes = _read(folder) or {}
    return [
        name
        for name, written in sorted(written_hashes.items())
        if name.startswith(f"{within}/" if within else "")
        and not ((folder / name).is_file() and _is(folder / name, written, large=large))
    ]


def _is(path: Path, written: str | None, *, large: bool) -> bool:
    """Whether the file has the hash that was written, if there is one and it is asked for."""
    if written is None:
        return True
    if not large and path.stat().st_size > LARGEST and not _is_sealed(path):
        return True
    return file_hash(path) == written


def _read(folder: Path) -> dict[str, str | None] | None:
    """The hash of each listed file; None if there is no readable list."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        named = {str(name): files[name] if isinstance(files, dict) else None for name in files}
        return named if all(map(_is_inside, named)) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _is_inside(name: str) -> bool:
    """Whether the name stays in the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _write(folder: Path, hashes: Mapping[str, str | None]) -> None:
    files = {name: hashes[name] for name in sorted(hashes)}
    text = json.dumps({"version": VERSION, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def file_hash(path: Path) -> str:
    """The hash of a file; of the header alone where that holds hashes of the rest."""
    if _is_sealed(path):
        return _digest([_header(path)])
    if path.stat().st_size <= LARGEST:
        return _digest([path.read_bytes()])
    with path.open("rb") as file:
        content = torch.frombuffer(
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8
        )
    return _digest(hashes(list(content.split(PIECE)), 8))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _is_sealed(path: Path) -> bool:
    return path.suffix == ".safetensors" and SEALED in _header(path)


def _header(path: Path) -> bytes:
    """The header of a safetensors file with its length before it; what there is of it."""
    with path.open("rb") as file:
        first = file.read(8)
        return first + file.read(min(int.from_bytes(first, "little"), LONGEST))
