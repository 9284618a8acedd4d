"""Where the networks that judge images keep their weights: a path that is given, or one folder of the user's cache."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowtide.errors import BadInput

State = Mapping[str, Tensor]


def folder() -> Path:
    """$XDG_CACHE_HOME/lowtide/metrics, where a user puts weights for good; ~/.cache without that variable."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowtide" / "metrics"


def hub_cache() -> Path:
    """Where torch keeps what other programs fetched before."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def found(what: str, file: str, given: str | Path | None, others: Sequence[Path] = ()) -> Path:
    """The first of the places that has the file; the path that is given is the only place then."""
    places = [Path(given)] if given else [folder() / file, *others]
    for place in places:
        if place.is_file():
            return place
    raise BadInput(f"found no weights for {what}", f"the file {file}", f"put it at {places[0]}")


def read(path: Path) -> State:
    """A state dict, read without running anything that the file may hold."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as wrong:
        raise BadInput(
            f"found {path}, which torch cannot read", "a state dict", "fetch the file again"
        ) from wrong


def file_hash(path: Path) -> str:
    """The start of the SHA-256 that `sha256sum` prints."""
    with open(path, "rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()[:12]}"


def state_hash(state: State) -> str:
    """The same over tensors, for models that come in several files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return f"sha256:{digest.hexdigest()[:12]}"
