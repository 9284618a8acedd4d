"""The arguments of a call as tensors by name, however they are nested."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def flat_inputs(inputs: Mapping[str, object], prefix: str = "") -> dict[str, Tensor]:
    """Tensors by name; a tensor in a nested dict or list gets a dotted name."""
    flat: dict[str, Tensor] = {}
    for name, value in inputs.items():
        if isinstance(value, tuple | list):
            value = {str(place): item for place, item in enumerate(value)}
        if isinstance(value, Mapping):
            flat |= flat_inputs(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor):
            flat[prefix + name] = value
    return flat


def mapped_inputs(
    inputs: Mapping[str, object], change: Callable[[str, Tensor], object], prefix: str = ""
) -> dict[str, Any]:
    """The same inputs with `change` applied to every tensor and its name in `flat_inputs`."""
    return {name: _mapped_input(prefix + name, each, change) for name, each in inputs.items()}


def _mapped_input(name: str, value: object, change: Callable[[str, Tensor], object]) -> object:
    if isinstance(value, Tensor):
        return change(name, value)
    if isinstance(value, Mapping):
        return mapped_inputs(value, change, f"{name}.")
    if isinstance(value, tuple | list) and not isinstance(value, torch.Size):
        items = [_mapped_input(f"{name}.{place}", each, change) for place, each in enumerate(value)]
        return type(value)(items)
    return value
