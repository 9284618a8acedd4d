"""The seal of a checkpoint: hashes of its plan, of the kind of each tensor, and of config.json.

Tensors have hashes of their bytes (file_format.py). The seal covers what gives these bytes their
meaning, so that an altered plan, type, shape or configuration is an error too.

    lowtide_seal      of the plan
    lowtide_kinds     of the name, type and shape of every tensor
    lowtide_config    of config.json, but for the version of diffusers and what lowtide says in it.
                      lowtide fills it in when it writes a folder; after `save_pretrained`, which
                      tells no quantizer of the configuration, it holds zeros and is not checked
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowtide.checkpoint.config_checks import read_json
from lowtide.checkpoint.headers import METADATA, header_of
from lowtide.errors import BadInput

SEAL = "lowtide_seal"
KINDS = "lowtide_kinds"
CONFIG = "lowtide_config"
CONFIG_FILE = "config.json"
SIZE = 8  # bytes of each hash
OPEN = "0" * 2 * SIZE  # stands for a configuration that is not known
TYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
Kinds = Mapping[str, tuple[str, tuple[int, ...]]]  # type and shape of each tensor


def seal_of(plan: str, state: Mapping[str, Tensor]) -> dict[str, str]:
    """The entries of the header of a file that is about to be written."""
    return {SEAL: _hash(plan), KINDS: _hash(_sorted(_kinds_of_state(state))), CONFIG: OPEN}


def _kinds_of_state(state: Mapping[str, Tensor]) -> Kinds:
    """Types and shapes, named as in the header of a file."""
    return {name: (TYPES[each.dtype], tuple(each.shape)) for name, each in state.items()}


def _kinds_of_files(paths: Iterable[Path]) -> Kinds:
    kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in paths:
        tensors = header_of(path)[1]
        tensors.pop(METADATA, None)
        kinds |= {name: (each["dtype"], tuple(each["shape"])) for name, each in tensors.items()}
    return kinds


def weights_seal(header: Mapping[str, str], hashes: str) -> str:
    """The hash of all that a header says of plan and tensors. hashes: the entry with those."""
    return _hash(json.dumps([header.get(name) for name in (SEAL, KINDS, hashes)]))


def check_plan(header: Mapping[str, str], plan: str, folder: Path) -> None:
    """The plan and the folder's config.json are those that were saved.

    Files of older versions have no seal.
    """
    if header.get(SEAL, _hash(plan)) != _hash(plan):
        raise BadInput(
            "found the plan altered since it was saved",
            "the one that its hash was taken of",
            "copy or download the folder again",
        )
    config = folder / CONFIG_FILE
    known = header.get(CONFIG, OPEN)
    if known != OPEN and config.exists() and known != _config_hash(config):
        raise BadInput(
            f"found {CONFIG_FILE} altered since it was saved",
            "the configuration that its hash was taken of",
            "copy or download the folder again; a change that you want is made on the loaded "
            "model, which you then save",
        )


def check_kinds(header: Mapping[str, str], paths: Iterable[Path]) -> None:
    """All tensors of the checkpoint, in these files, have the types and shapes that were saved."""
    if KINDS in header and header[KINDS] != _hash(_sorted(_kinds_of_files(paths))):
        raise BadInput(
            "found the type or the shape of a tensor altered since it was saved",
            "those that their hash was taken of",
            "copy or download the folder again",
        )


def finish(folder: Path) -> None:
    """Complete the headers of the files that diffusers wrote into this folder, in place.

    They get the hash of the configuration, and their entries an order, so that the same content
    gives the same bytes.
    """
    for path in folder.rglob("*.safetensors"):
        length, header = header_of(path)
        entries: dict[str, str] = header.get(METADATA, {})
        if SEAL not in entries:
            continue
        config = path.parent / CONFIG_FILE
        if config.exists():
            entries[CONFIG] = _config_hash(config)
        ordered = {name: entries[name] for name in sorted(entries)}
        tensors = {name: each for name, each in header.items() if name != METADATA}
        whole = {METADATA: ordered} | tensors
        text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        with path.open("r+b") as file:
            file.seek(8)
            file.write(text.ljust(length))


def _sorted(kinds: Kinds) -> str:
    return json.dumps([[name, *kinds[name]] for name in sorted(kinds)])


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=SIZE).hexdigest()


def _config_hash(path: Path) -> str:
    """The hash of what config.json says of the network."""
    values = read_json(path)
    kept = {
        name: value
        for name, value in values.items()
        if name != "quantization_config" and (name == "_class_name" or not name.startswith("_"))
    }
    return _hash(json.dumps(kept, sort_keys=True))
