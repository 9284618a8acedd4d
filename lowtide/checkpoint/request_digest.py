"""Digests of requests: what the images of named models depend on. Equal digests give equal images.

Only models that are named have one: a program can change a model in memory in ways that its weights
do not show.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import diffusers
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from lowtide import sampling
from lowtide.checkpoint.file_format import PICTURE
from lowtide.checkpoint.folders import LOCK
from lowtide.checkpoint.manifest import MANIFEST, file_hash
from lowtide.sampling.call_values import recorded
from lowtide.stages.base import code_hash
from lowtide.stages.finished_work import holds_runs_alone

LENGTH = 12
# lowtide writes the numbers of an evaluation, and a picture, into a model's card.
_NOT_READ = (MANIFEST, "README.md", PICTURE, LOCK)


def request_digest(
    sources: Sequence[str], request: sampling.Request, device: torch.device, **others: object
) -> str | None:
    """A hash of the models, the request, the code and the kind of device; None if one has no name.

    others: what else the result depends on, as values of JSON.
    """
    contents = [content_hash(source) for source in sources]
    if None in contents:
        return None
    values = asdict(request)
    files = [stamp(Path(name)) for name in _texts([request.pictures, request.call])]
    versions = {"code": code_hash(), "diffusers": diffusers.__version__, "device": device.type}
    return digest_of([contents, values, files, versions, others])


def digest_of(values: object) -> str:
    """A hash of values of JSON."""
    text = json.dumps(values, sort_keys=True, default=recorded)
    return hashlib.sha256(text.encode()).hexdigest()[:LENGTH]


def content_hash(source: str) -> str | None:
    """A hash of the files of a model in a folder; the commit of a model of the hub."""
    folder = sampling.local_folder(source)
    if folder is None:
        return _commit(source)
    files = {path.relative_to(folder).as_posix(): file_hash(path) for path in _read_by_load(folder)}
    return digest_of(files)


def _commit(name: str) -> str | None:
    """The commit of the snapshot in the cache of the hub, which loading has put there."""
    try:
        return Path(snapshot_download(name, local_files_only=True)).name
    except (LocalEntryNotFoundError, HfHubHTTPError, ValueError, OSError):
        return None


def _read_by_load(folder: Path) -> Iterator[Path]:
    """The files that loading may read: not those of an evaluation inside the folder."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _NOT_READ:
            continue
        if not path.is_dir():
            yield path
        elif not (path / MANIFEST).exists() and not holds_runs_alone(path):
            yield from _read_by_load(path)


def stamp(path: Path) -> list[list[str | int]]:
    """Names, sizes and times of a file or of the files in a folder; none where none are."""
    try:
        paths = sorted(path.rglob("*")) if path.is_dir() else [path]
        states = [(str(each), each.stat()) for each in paths]
    except (OSError, ValueError):
        return []
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _texts(tree: object) -> Iterator[str]:
    """The texts in nested values, which may be paths of pictures."""
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _texts(list(tree.values()))
    elif isinstance(tree, list | tuple):
        for each in tree:
            yield from _texts(each)
