"""Which weights belong to a config.json that diffusers writes.

`save_pretrained` of diffusers asks no quantizer once the files are there. So it is wrapped: behind
it, config.json names the seals of the packed weights in its folder, and loading compares them. The
seal is a hash of the hashes in their header. A folder with variants has a seal of each.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt
from torch import nn

from lowtide.checkpoint.file_format import HASHES, PLAN, verified
from lowtide.checkpoint.headers import METADATA, header_of
from lowtide.checkpoint.quantization_config import LowtideConfig
from lowtide.checkpoint.seal import CONFIG_FILE, weights_seal
from lowtide.errors import BadInput

FIELD = "quantization_config"


def wrap(module: ModuleType) -> None:
    wrapt.wrap_function_wrapper(module, "ModelMixin.save_pretrained", _saved)
    wrapt.wrap_function_wrapper(module, "ModelMixin._upload_folder", _uploaded)


def check_belongs(header: Mapping[str, str], seals: Sequence[str], path: str | Path) -> None:
    """The weights in this file are among those that config.json names, if it names any."""
    if seals and verified() != "off" and weights_seal(header, HASHES) not in seals:
        raise BadInput(
            f"found weights of another model in {Path(path).name}",
            f"those that were saved with {CONFIG_FILE}",
            "copy or download the whole folder again",
        )


def _saved(wrapped: Callable[..., Any], model: nn.Module, args: tuple, kwargs: dict) -> Any:
    result = wrapped(*args, **kwargs)
    asked = signature(wrapped).bind(*args, **kwargs)
    asked.apply_defaults()
    if asked.arguments["is_main_process"] and _is_packed(model):
        name_weights(Path(asked.arguments["save_directory"]))
    return result


def _uploaded(wrapped: Callable[..., Any], model: nn.Module, args: tuple, kwargs: dict) -> Any:
    """`save_pretrained(push_to_hub=True)` uploads before it returns."""
    asked = signature(wrapped).bind(*args, **kwargs)
    if _is_packed(model):
        name_weights(Path(asked.arguments["working_dir"]))
    return wrapped(*args, **kwargs)


def _is_packed(model: nn.Module) -> bool:
    quantizer = getattr(model, "hf_quantizer", None)
    return isinstance(getattr(quantizer, FIELD, None), LowtideConfig)


def name_weights(folder: Path) -> None:
    """Write the seals of the packed weights in this folder into its config.json."""
    headers = [header_of(path)[1].get(METADATA, {}) for path in folder.glob("*.safetensors")]
    seals = {weights_seal(header, HASHES) for header in headers if PLAN in header}
    config = folder / CONFIG_FILE
    values = json.loads(config.read_text(encoding="utf-8"))
    values[FIELD] |= {"seals": sorted(seals)}
    # As diffusers writes it.
    text = json.dumps(values, indent=2, sort_keys=True)
    config.write_text(f"{text}\n", encoding="utf-8")
