"""Any denoiser called (sample, timestep, ...): blocks are the children of the outermost module lists it holds."""

from typing import Any

import torch
from torch import Tensor, nn

from lowtide.models.adapter import Architecture, Example
from lowtide.models.trace import mapped


def block_classes(model: nn.Module) -> tuple[str, ...]:
    """Class names found in the outermost lists of modules."""
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(
            name.startswith(f"{outer}.") for outer in lists
        ):
            lists.append(name)
    classes = {type(child).__name__ for name in lists for child in model.get_submodule(name)}
    return tuple(sorted(classes - {"Linear", "Conv2d"}))


def like(example: dict[str, Any], shared: tuple[str, ...] = ()) -> Example:
    """Inputs shaped like an example call's, for any batch; `shared` ones have no batch axis."""
    size = next(
        len(value) for value in example.values() if isinstance(value, Tensor) and value.dim()
    )

    def resized(model: nn.Module, batch: int) -> dict[str, Any]:
        device = next(model.parameters()).device

        def fit(leaf: Any, name: str) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            grows = leaf.dim() and len(leaf) == size and name not in shared
            return torch.zeros(
                (batch, *leaf.shape[1:]) if grows else leaf.shape, dtype=leaf.dtype, device=device
            )

        return {
            name: mapped(value, lambda leaf, name=name: fit(leaf, name))
            for name, value in example.items()
        }

    return resized


def generic_architecture(model: nn.Module, example: dict[str, Any]) -> Architecture:
    """The architecture of a model nobody described, from one example call."""
    return Architecture(block_classes(model), like(example))
