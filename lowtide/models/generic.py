"""Any denoiser called (sample, timestep, ...), described by one example call.

Its blocks are the children of the outermost module lists.
"""

from functools import partial

import torch
from torch import Tensor, nn

from lowtide.models.adapter import Architecture, Arguments, Example
from lowtide.models.trace import mapped


def block_classes(model: nn.Module) -> tuple[str, ...]:
    """Class names of the modules in the outermost lists of modules."""
    lists: list[str] = []
    classes: set[str] = set()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(name)
            classes |= {type(child).__name__ for child in module}
    return tuple(sorted(classes - {"Linear", "Conv2d"}))


def like(example: Arguments, shared: tuple[str, ...] = ()) -> Example:
    """Inputs shaped like an example call's, for any batch; `shared` inputs have no batch axis."""
    tensors = (value for value in example.values() if isinstance(value, Tensor))
    size = next(len(tensor) for tensor in tensors if tensor.dim())

    def resized(model: nn.Module, batch: int) -> Arguments:
        device = next(model.parameters()).device

        def zeros(leaf: object, *, batched: bool) -> object:
            if not isinstance(leaf, Tensor):
                return leaf
            grows = batched and leaf.dim() and len(leaf) == size
            shape = (batch, *leaf.shape[1:]) if grows else leaf.shape
            return torch.zeros(shape, dtype=leaf.dtype, device=device)

        return {
            name: mapped(value, partial(zeros, batched=name not in shared))
            for name, value in example.items()
        }

    return resized


def generic_architecture(model: nn.Module, example: Arguments) -> Architecture:
    """The architecture of a model that ARCHITECTURES does not describe, from one example call."""
    return Architecture(block_classes(model), like(example))
