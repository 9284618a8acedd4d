"""Where the networks of the metrics keep their weights: a given path, or a folder of the cache."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import BadInput

State = Mapping[str, Tensor]


def folder() -> Path:
    """$XDG_CACHE_HOME/lowtide/metrics, where a user stores weights; without it, in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowtide" / "metrics"


def hub_cache() -> Path:
    """Where torch stores weights that other programs downloaded."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def package_folders(package: str) -> list[Path]:
    """The folders of an installed package, without an import, which may take seconds."""
    spec = find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return [Path(folder) for folder in folders or ()]


def weights_file(
    what: str, name: str, path: str | Path | None, fallbacks: Sequence[Path] = ()
) -> Path:
    """The file of weights: `path` alone if it is set, else the first of the places that has it."""
    places = [Path(path)] if path else [folder() / name, *fallbacks]
    for place in places:
        if place.is_file():
            return place
    raise BadInput(f"found no weights for {what}", f"the file {name}", f"put it at {places[0]}")


def read(path: Path) -> State:
    """A state dict; code in the file is not run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        wrong = f"found {path}, which torch cannot read"
        raise BadInput(wrong, "a state dict", "download the file again") from error


def file_hash(path: Path) -> str:
    """The first digits of the SHA-256 that `sha256sum` prints."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def state_hash(state: State) -> str:
    """A hash over tensors, for models that come in several files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()[:12]}"
