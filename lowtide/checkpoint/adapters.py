"""Adapters of peft on a model: which are loaded, fused before a quantization, left out of a file.

peft puts a layer of its own around each layer that it adapts, and the layer it found is that one's
`base_layer`. This module asks for that name, so that peft is not imported where nobody uses it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.nn.float_layers import replace_module
from lowtide.nn.plan import Plan
from lowtide.nn.side_branch import DOWN, side_plans
from lowtide.nn.swap import packed_layers

BASE = "base_layer"
_MATRIX = ".lora_A."


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of peft in a model, by name."""
    for name, module in model.named_modules():
        if BASE in module._modules:
            yield name, module


def loaded_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are active and not fused."""
    names: dict[str, None] = {}
    for _, layer in adapted_layers(model):
        active = [] if layer.disable_adapters else layer.active_adapters
        names |= dict.fromkeys(name for name in active if name not in layer.merged_adapters)
    return list(names)


def settle_adapters(pipe: Any, *, fuse_lora: bool | str | Path) -> None:
    """Leave no adapter in a pipeline's models: their weights are all there is.

    `fuse_lora`: True fuses those that are loaded; a file, a folder or a hub id is loaded before. An
    adapter that is loaded and not to be fused is an error. One that was fused before stays so.
    """
    if not isinstance(fuse_lora, bool):
        load_lora(pipe, fuse_lora)
    components = getattr(pipe, "components", {})
    models = {name: each for name, each in components.items() if isinstance(each, nn.Module)}
    for name, model in models.items():
        loaded = loaded_adapters(model)
        if loaded and not fuse_lora:
            raise BadInput(
                f"found the LoRA {', '.join(loaded)} loaded in the {name}",
                "a model without one, or with one to fuse",
                "give fuse_lora=True (--fuse-lora FILE), or call unload_lora_weights() before and "
                "load the LoRA into the packed model",
            )
    for model in models.values():
        fuse_adapters(model)


def fuse_adapters(model: nn.Module) -> None:
    """Add each active adapter to the weights, and take the layers of peft off."""
    layers = dict(adapted_layers(model))
    for layer in layers.values():
        if not layer.disable_adapters and set(layer.active_adapters) - set(layer.merged_adapters):
            layer.merge()
    for name, layer in layers.items():
        if name.rpartition(".")[0] not in layers:
            replace_module(model, name, layer.get_base_layer())
    # As diffusers' `unload_lora` leaves a model.
    if vars(model).pop("peft_config", None) is not None:
        model.__dict__["_hf_peft_config_loaded"] = False


def load_lora(pipe: Any, source: str | Path) -> None:
    """Load a LoRA into a pipeline as diffusers does: from a file, a folder or a hub id."""
    load = getattr(pipe, "load_lora_weights", None)
    if load is None:
        raise BadInput(
            f"found a LoRA for a {type(pipe).__name__}",
            "a pipeline into which diffusers loads one",
            "add it to the model with peft, and give fuse_lora=True",
        )
    if find_spec("peft") is None:
        raise BadInput("found no peft", "the package that runs a LoRA", "pip install peft")
    path = Path(source)
    if not path.exists() and (str(source).count("/") != 1 or str(source).startswith((".", "~"))):
        raise BadInput(
            f"found no file {source}", "a LoRA: a file, a folder or a hub id", "check the path"
        )
    place = {"weight_name": path.name} if path.is_file() else {}
    try:
        load(str(path.parent if path.is_file() else source), **place)
    except BadInput:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(
            f"found {source} unreadable as a LoRA ({reason})",
            f"a LoRA that diffusers loads into a {type(pipe).__name__}",
            "check the path and the model that the LoRA was made for",
        ) from error


def check_saveable(pipe: Any) -> None:
    """No model of the pipeline would be saved as an adapter alone, as transformers does."""
    for name, model in getattr(pipe, "components", {}).items():
        is_of_transformers = isinstance(model, nn.Module) and not _is_packed(model)
        if is_of_transformers and any(adapted_layers(model)):
            raise BadInput(
                f"found a LoRA in the {name}, whose folder could not be loaded again",
                "a LoRA in packed layers alone",
                "call unload_lora_weights() before; a LoRA that was fused stays fused",
            )


def _is_packed(model: nn.Module) -> bool:
    return any(packed_layers(model))


def without_adapters(state: dict[str, Tensor], plan: Plan) -> tuple[dict[str, Tensor], Plan]:
    """The state of a packed model alone, under the names of its plan, and the plan of its branches.

    A LoRA that was fused is a branch of its layer and stays. One that was not stays out.
    """
    adapted = {name.partition(f".{BASE}.")[0] for name in state if f".{BASE}." in name}
    kept: dict[str, Tensor] = {}
    left_out: list[str] = []
    for name, tensor in state.items():
        holder = _holder(name, adapted)
        if holder is None or name.startswith(f"{holder}.{BASE}."):
            kept[name.replace(f".{BASE}.", ".")] = tensor
        else:
            left_out.append(name)
    _tell(left_out, state, adapted)
    return kept, replace(plan, sides=side_plans(kept))


def _holder(name: str, adapted: set[str]) -> str | None:
    """The adapted layer that a tensor belongs to."""
    parts = name.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((each for each in names if each in adapted), None)


def _tell(left_out: list[str], state: dict[str, Tensor], adapted: set[str]) -> None:
    """One sentence where an adapter is left out that no branch holds."""
    ranks = dict.fromkeys(adapted, 0)
    names: dict[str, None] = {}
    for name in left_out:
        holder, matrix, rest = name.partition(_MATRIX)
        if matrix:
            ranks[holder] += len(state[name])
            names[rest.removesuffix(".weight")] = None
    for name in state:
        holder, base, rest = name.partition(f".{BASE}.")
        if base and rest.endswith(DOWN):
            ranks[holder] -= len(state[name])
    is_fused = max(ranks.values(), default=0) <= 0
    if left_out and not is_fused:
        warnings.warn(
            f"The saved model is the packed one without the LoRA {', '.join(names)}, which was "
            "loaded and not fused. Call fuse_lora() before, or keep the LoRA's own file.",
            stacklevel=2,
        )
