"""The list of the files that lowtide wrote into a folder, with a hash of each small one.

A folder without a readable list is nobody's: lowtide removes nothing in it. Files of weights have
no hash here, because safetensors that lowtide writes hold one for each tensor.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

MANIFEST = "lowtide-files.json"
VERSION = 2  # version 1 is a list of names without hashes
LARGEST = 2**24  # bytes of a file that is hashed


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write the list of these files, which stand in the folder."""
    _write(folder, {name: _hash(folder / name) for name in names})


def add_listed(folder: Path, name: str, content: Path) -> None:
    """Add a file to the list. It stands at `content`, and gets its name afterwards."""
    _write(folder, (_read(folder) or {}) | {name: _hash(content)})


def listed(folder: Path) -> frozenset[str]:
    """The files that lowtide wrote into a folder; none if there is no readable list."""
    hashes = _read(folder)
    return frozenset(hashes) | {MANIFEST} if hashes is not None else frozenset()


def altered(folder: Path) -> list[str]:
    """The listed files that are missing, or whose bytes are not those that lowtide wrote."""
    hashes = _read(folder) or {}
    return [
        name
        for name, written in sorted(hashes.items())
        if not (folder / name).is_file() or (written and _hash(folder / name) != written)
    ]


def _read(folder: Path) -> dict[str, str | None] | None:
    """The hash of each listed file; None if there is no readable list."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        return {str(name): files[name] if isinstance(files, dict) else None for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, hashes: Mapping[str, str | None]) -> None:
    files = {name: hashes[name] for name in sorted(hashes)}
    text = json.dumps({"version": VERSION, "files": files}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _hash(path: Path) -> str | None:
    """The hash of a small file that holds no tensors."""
    if path.suffix == ".safetensors" or path.stat().st_size > LARGEST:
        return None
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
