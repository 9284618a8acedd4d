"""Adapters of peft on a model: which are loaded, fused before a quantization, left out of a file.

peft puts a layer of its own around each layer that it adapts, and the layer it found is that one's
`base_layer`. This module asks for that name, so that peft is not imported where nobody uses it.
"""

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.nn.float_layers import replace_module
from lowtide.nn.plan import Plan
from lowtide.nn.side_branch import DOWN, side_plans

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


def check_adapters(model: nn.Module, *, fuse: bool) -> None:
    """A model whose adapters are fused, or are to be fused, so that its weights are all there is.

    peft's layers are taken off; a model without any stays as it is.
    """
    loaded = loaded_adapters(model)
    if loaded and not fuse:
        raise BadInput(
            f"found the LoRA {', '.join(loaded)} loaded in the {type(model).__name__}",
            "a model without one, or with one to fuse",
            "give fuse_lora=True (--fuse-lora), or call unload_lora_weights() before and load the "
            "LoRA into the packed model",
        )
    layers = dict(adapted_layers(model))
    for layer in layers.values():
        if loaded and not layer.disable_adapters:
            layer.merge(safe_merge=True)
    # Outermost first: taking it off takes off what it stands around, too.
    for name in sorted(layers, key=len):
        replace_module(model, name, layers[name].get_base_layer())
        model.get_submodule(name).requires_grad_(False)
    _forget_adapters(model)


def _forget_adapters(model: nn.Module) -> None:
    """As diffusers' `unload_lora` leaves a model."""
    if vars(model).pop("peft_config", None) is not None and "_hf_peft_config_loaded" in vars(model):
        model.__dict__["_hf_peft_config_loaded"] = None


def without_adapters(
    state: dict[str, Tensor], plan: Plan
) -> tuple[dict[str, Tensor], Plan]:
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
    fused = [f"{layer}.{BASE}.{DOWN}" for layer in adapted]
    is_fused = all(name in state and len(state[name]) >= ranks[name.partition(f".{BASE}.")[0]] for name in fused)
    if left_out and not is_fused:
        warnings.warn(
            f"The saved model is the packed one without the LoRA {', '.join(names)}, which was "
            "loaded and not fused. Call fuse_lora() before, or keep the LoRA's own file.",
            stacklevel=2,
        )
