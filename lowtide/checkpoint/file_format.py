"""The checkpoint: an ordinary diffusers folder whose safetensors hold packed codes, tables and a plan; safe to write and read.

    config.json                quantization_config: quant_method "lowtide", format version, a summary (bits, method, steps)
    *.safetensors, tensors     NAME.weight   packed codes, uint8: rows x ceil(columns * bits / 8), lowest bit first; flat if mixed
                               NAME.grid     int32 words holding, each begun at a whole word: scale float32, rows x 1;
                                             zero uint8, rows x 1 (unsigned formats); factor uint8, rows x groups (grouped
                                             formats); smooth float32, what input channels are divided by (where they are).
                                             value = (code - zero) * factor * scale; see formats/bundle.py for why
                               lowtide_clock.scale / .zero         float32 / uint8, quantizers x timesteps (x 1: one for all):
                                                                   inputs of the plan's layers, then its attentions, in order
                               lowtide_clock.timesteps             int32, the calibrated timesteps
                               lowtide_correction.slope / .bias / .noise   float32, timesteps / x channels: see nn/correction.py
                               everything else                     as in the float model
    *.safetensors, metadata    lowtide_version, lowtide_plan (JSON, see plan.py), lowtide_hashes (base64, by name)

Every tensor's hash is compared at loading, and names must match exactly: an altered, truncated or mixed-up checkpoint is an
error, never a blurred picture. Folders are written beside their place and renamed into it.
"""

import base64
import hashlib
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.nn.clock import CLOCK
from lowtide.nn.correction import CORRECTION
from lowtide.nn.plan import FORMAT_VERSION, Plan
from lowtide.nn.swap import packed_layers

HASH = 5  # bytes of each hash: enough to notice damage, little enough for a header

PLAN, HASHES, VERSION = "lowtide_plan", "lowtide_hashes", "lowtide_version"


def tensor_hash(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().cpu().flatten()
    return hashlib.blake2b(
        flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"", digest_size=HASH
    ).digest()


def metadata(plan: Plan, state: dict[str, Tensor]) -> dict[str, str]:
    """What goes into the header of every safetensors file. Hashes stand in the order of the sorted names."""
    hashes = b"".join(tensor_hash(state[name]) for name in sorted(state))
    return {
        VERSION: str(FORMAT_VERSION),
        PLAN: plan.to_json(),
        HASHES: base64.b64encode(hashes).decode(),
    }


def hashes_by_name(names: list[str], hashes: str) -> dict[str, bytes]:
    found = base64.b64decode(hashes)
    return {
        name: found[HASH * place : HASH * (place + 1)] for place, name in enumerate(sorted(names))
    }


def read_metadata(path: str | Path) -> dict[str, str]:
    """The header of one file, checked for being ours."""
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    if PLAN not in found or HASHES not in found:
        raise BadInput(
            f"found no lowtide plan in {Path(path).name}",
            "a checkpoint saved by lowtide",
            "save it again with .save(folder)",
        )
    check_version(int(found[VERSION]))
    return found


def check_version(found: int) -> None:
    """Version 1 held scales and zero points under names of their own, and was never released."""
    if found > FORMAT_VERSION:
        raise BadInput(
            f"found format version {found}", f"at most {FORMAT_VERSION}", "upgrade lowtide"
        )
    if found < FORMAT_VERSION:
        raise BadInput(
            f"found format version {found}", str(FORMAT_VERSION), "quantize the float model again"
        )


def verify(state: dict[str, Tensor], hashes: dict[str, bytes]) -> None:
    """Every tensor is the one that was saved."""
    for name, tensor in state.items():
        if hashes.get(name) != tensor_hash(tensor):
            raise BadInput(
                f"found tensor {name} altered since it was saved",
                "the bytes its hash was taken of",
                "copy or download it again",
            )


def verify_names(model: nn.Module, names: list[str]) -> None:
    """The checkpoint holds what the plan promises, no more and no less."""
    expected, found = set(model.state_dict()), set(names)
    if difference := sorted(expected ^ found):
        what = "missing" if difference[0] in expected else "unknown"
        raise BadInput(
            f"found {len(difference)} tensors that do not fit the plan (first: {difference[0]}, {what})",
            "the tensors of one complete checkpoint",
            "copy the whole folder again, without files of another one",
        )


def account(model: nn.Module) -> dict[str, int]:
    """Bytes of a packed model by kind: codes, their scales, input tables, and what is float."""
    layers = {name for name, _ in packed_layers(model)}
    kinds = {"codes": 0, "scales": 0, "tables": 0, "float": 0}
    for name, tensor in model.state_dict().items():
        kinds[kind_of(name, layers)] += tensor.numel() * tensor.element_size()
    return kinds | {"total": sum(kinds.values())}


def kind_of(name: str, layers: set[str]) -> str:
    holder, _, leaf = name.rpartition(".")
    if holder in layers and leaf != "bias":
        return "codes" if leaf == "weight" else "scales"
    return "tables" if holder in (CLOCK, CORRECTION) else "float"
