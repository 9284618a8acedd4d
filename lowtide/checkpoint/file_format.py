"""The file format: an ordinary diffusers folder whose safetensors hold codes, tables and a plan.

    config.json   quantization_config: quant_method "lowtide", format version, summary (bits,
                  method, steps)

    *.safetensors, tensors
    NAME.weight   packed codes, uint8: rows x ceil(columns * bits / 8), lowest bit first; flat if
                  the rows differ in bits
    NAME.grid     int32 words that hold, each from the start of a word:
                      scale   float32, rows x 1
                      zero    uint8, rows x 1 (unsigned formats)
                      factor  uint8, rows x groups (grouped formats)
                      smooth  float32, one divisor per input channel (where channels are smoothed)
                  value = (code - zero) * factor * scale; formats/table_packing.py says why
    NAME.side.down.weight, .side.up.weight, .side.up.bias
                  float, the factors of a fused LoRA beside the layer: see nn/side_branch.py (since
                  version 4)
    lowtide_clock.scale, .zero
                  float32 and uint8, quantizers x timesteps (x 1 if one range serves all): the
                  inputs of the plan's layers, then of its attentions, in order
    lowtide_clock.timesteps
                  int32, the calibrated timesteps
    lowtide_correction.slope, .bias, .noise
                  float32, timesteps / x channels: see nn/correction.py
    others        as in the float model

    *.safetensors, metadata
    lowtide_version, lowtide_plan (JSON, see nn/plan.py), lowtide_seal, lowtide_kinds,
    lowtide_config (see seal.py)
    lowtide_hashes
                  base64, 5 bytes for each tensor in the order of the names: its checksum (see
                  kernels/hashing.py); before version 6, BLAKE2b

Loading compares every tensor's hash, and the names must match exactly: an altered, truncated or
mixed-up checkpoint is an error, never a blurred picture. folders.py writes whole folders.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lowtide.checkpoint.headers import header_of
from lowtide.checkpoint.manifest import MANIFEST, altered
from lowtide.checkpoint.seal import TYPES, check_kinds, check_plan, seal_of
from lowtide.checkpoint.values import check_values
from lowtide.errors import BadInput
from lowtide.kernels.hashing import checksums, hashes
from lowtide.nn.clock import CLOCK
from lowtide.nn.correction import CORRECTION
from lowtide.nn.plan import FORMAT_VERSION, OLDEST_VERSION, Plan
from lowtide.nn.swap import packed_layers

# Bytes of each hash: enough to notice damage, few enough for a header.
HASH = 5
# The first version with checksums; those before have BLAKE2b.
CHECKSUMS = 6

PLAN = "lowtide_plan"
HASHES = "lowtide_hashes"
VERSION = "lowtide_version"
# Types of a float tensor: a model may be saved in another one than it is loaded in.
FLOATS = ("F16", "BF16", "F32", "F64")
# Files of a folder that say nothing of how it draws.
PICTURE = "lowtide-images.png"
UNREAD = ("README.md", "lowtide.json", PICTURE)


def metadata(plan: Plan, state: dict[str, Tensor]) -> dict[str, str]:
    """The header of every safetensors file. Hashes are in the order of the sorted names."""
    in_order = checksums([state[name] for name in sorted(state)], HASH)
    text = plan.to_json()
    return {
        VERSION: str(FORMAT_VERSION),
        PLAN: text,
        HASHES: base64.b64encode(b"".join(in_order)).decode(),
        **seal_of(text, state),
    }


def hashes_by_name(names: list[str], text: str) -> dict[str, bytes]:
    """The hash of each tensor, from the header's text."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        data = b""
    if len(data) != HASH * len(names):
        raise BadInput(
            f"found {len(data) // HASH} hashes for {len(names)} tensors in {HASHES}",
            "one for each",
            "copy or download the checkpoint again",
        )
    starts = range(0, HASH * len(names), HASH)
    return {
        name: data[start : start + HASH] for name, start in zip(sorted(names), starts, strict=True)
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header of one file, once it is known that lowtide wrote it."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise BadInput(
            f"found a header in {Path(path).name} that safetensors cannot read ({error})",
            "the file that was saved",
            "copy or download it again",
        ) from error
    if PLAN not in header or HASHES not in header:
        raise BadInput(
            f"found no lowtide plan in {Path(path).name}",
            "a checkpoint saved by lowtide",
            "save it again with .save(folder)",
        )
    text = header.get(VERSION, "")
    check_version(int(text) if text.isdecimal() and len(text) < 6 else text)
    return header


def check_version(version: object) -> None:
    """Version 1 had tensors of their own for scales and zero points, and was never released."""
    if not isinstance(version, int) or isinstance(version, bool):
        raise BadInput(
            f"found format_version {str(version)[:40]!r}",
            f"a number, {OLDEST_VERSION} to {FORMAT_VERSION}",
            "copy or download the checkpoint again",
        )
    if version > FORMAT_VERSION:
        raise BadInput(
            f"found format_version {version}", f"at most {FORMAT_VERSION}", "upgrade lowtide"
        )
    if version < OLDEST_VERSION:
        raise BadInput(
            f"found format_version {version}",
            f"{OLDEST_VERSION} to {FORMAT_VERSION}",
            "quantize the float model again",
        )


# How much of a checkpoint is compared with its hashes: all, all but the tensors' bytes, or nothing.
Verification = Literal["full", "fast", "off"]
_verification: ContextVar[Verification] = ContextVar("verification", default="full")


@contextmanager
def verifying(much: Verification) -> Iterator[None]:
    """Within the context, checkpoints are verified this much; elsewhere, in full."""
    token = _verification.set(much)
    try:
        yield
    finally:
        _verification.reset(token)


# True while `lowtide verify` loads a folder. It compares files and values itself, so that one error
# does not hide the others.
_naming_all: ContextVar[bool] = ContextVar("naming_all", default=False)


@contextmanager
def naming_all() -> Iterator[None]:
    """Within the context, loading leaves the files and the values to its caller."""
    token = _naming_all.set(True)
    try:
        yield
    finally:
        _naming_all.reset(token)


def verified() -> Verification:
    """How much is compared in this context."""
    return _verification.get()


def check_unaltered(folder: Path, within: str = "", without: Iterable[str] = ()) -> None:
    """The files that loading reads from a folder of ours are those that lowtide wrote.

    within: only those of this part of a pipeline. without: not these, or those of these parts.
    """
    left_out = {*UNREAD, *without}
    if _verification.get() == "off" or _naming_all.get():
        return
    for name in altered(folder, large=_verification.get() == "full", within=within):
        if name in left_out or name.partition("/")[0] in left_out:
            continue
        state = "altered" if (folder / name).is_file() else "missing"
        raise BadInput(
            f"found {name} in {folder} {state} since lowtide wrote it",
            f"the files of {MANIFEST}",
            "copy the folder again; if the change is yours, load with verify='off' and save",
        )


def verify_plan(header: Mapping[str, str], path: str | Path) -> None:
    """The plan of this file, and the configuration beside it, are those that were saved."""
    if _verification.get() != "off":
        check_plan(header, header[PLAN], Path(path).parent)


def verify_kinds(header: Mapping[str, str], paths: Iterable[str | Path]) -> None:
    """The tensors in these files have the types and shapes that were saved."""
    if _verification.get() != "off":
        check_kinds(header, map(Path, paths))


def verify(state: dict[str, Tensor], saved: dict[str, bytes], header: Mapping[str, str]) -> None:
    """Every tensor has the hash that was saved with it, of the kind that its version has."""
    if _verification.get() != "full":
        return
    taken = checksums if int(header[VERSION]) >= CHECKSUMS else hashes
    for name, found in zip(state, taken(list(state.values()), HASH), strict=True):
        if saved.get(name) != found:
            raise BadInput(
                f"found tensor {name} altered since it was saved",
                "the bytes its hash was taken of",
                "copy or download it again",
            )


def verify_values(model: nn.Module, plan: Plan) -> None:
    """Scales, zero points and timesteps are such as a quantization gives."""
    if _verification.get() == "full" and not _naming_all.get():
        check_values(model, plan)


def verify_shapes(model: nn.Module, paths: Iterable[Path]) -> None:
    """Every tensor in the files has the type and shape that the plan and the network give it."""
    header: dict[str, Any] = {}
    for path in paths:
        header |= header_of(path)[1]
    for name, expected in model.state_dict().items():
        found = (header[name]["dtype"], tuple(header[name]["shape"]))
        kind = TYPES[expected.dtype]
        fits = found[0] in FLOATS if expected.is_floating_point() else found[0] == kind
        if not fits or found[1] != tuple(expected.shape):
            raise BadInput(
                f"found tensor {name} of type {found[0]} and shape {list(found[1])}",
                f"{kind} and {list(expected.shape)}, as the plan and config.json say",
                "copy or download the checkpoint again",
            )


def verify_names(model: nn.Module, names: list[str]) -> None:
    """The checkpoint holds the tensors of the plan, no more and no less."""
    expected = set(model.state_dict())
    if difference := sorted(expected ^ set(names)):
        kind = "missing" if difference[0] in expected else "unknown"
        raise BadInput(
            f"found {len(difference)} tensors that do not fit the plan "
            f"(first: {difference[0]}, {kind})",
            "the tensors of one complete checkpoint",
            "copy the whole folder again, without files of another one",
        )


def account(model: nn.Module) -> dict[str, int]:
    """Bytes of a packed model by kind: codes, their scales, input tables, and float tensors."""
    layers = {name for name, _ in packed_layers(model)}
    kinds = {"codes": 0, "scales": 0, "tables": 0, "float": 0}
    for name, tensor in model.state_dict().items():
        kinds[_kind(name, layers)] += tensor.numel() * tensor.element_size()
    return kinds | {"total": sum(kinds.values())}


def _kind(name: str, layers: set[str]) -> str:
    holder, _, leaf = name.rpartition(".")
    if holder in layers and leaf != "bias":
        return "codes" if leaf == "weight" else "scales"
    return "tables" if holder in (CLOCK, CORRECTION) else "float"
