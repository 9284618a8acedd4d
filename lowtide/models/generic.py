"""Any denoiser called (sample, timestep, ...), described by one or two example calls.

Its blocks are the children of the outermost module lists. Two calls, with one and with two images,
tell which inputs have a batch axis: the first axis of the others has the same length in both.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from lowtide.models.adapter import Architecture, Arguments, Example
from lowtide.models.named_inputs import flat_inputs, mapped_inputs


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


def samples_of(example: Arguments) -> int:
    """The number of samples of a call: the first axis of its first tensor that has one."""
    return next(len(tensor) for tensor in flat_inputs(example).values() if tensor.dim())


def like(example: Arguments, architecture: Architecture | None = None) -> Example:
    """Inputs shaped like an example call's, for any batch.

    `architecture` says which inputs have no batch axis, and which have several rows a sample.
    """
    known = architecture or Architecture((), lambda model, batch: {})
    size = samples_of(example)

    def resized(model: nn.Module, batch: int) -> Arguments:
        device = next(model.parameters()).device

        def zeros(name: str, leaf: Tensor) -> Tensor:
            rows = known.rows(name, leaf, size)
            shape = (batch * rows, *leaf.shape[1:]) if rows else leaf.shape
            return torch.zeros(shape, dtype=leaf.dtype, device=device)

        return mapped_inputs(example, zeros)

    return resized


def generic_architecture(model: nn.Module, example: Arguments) -> Architecture:
    """The architecture of a model that ARCHITECTURES does not describe, from one example call."""
    return Architecture(block_classes(model), like(example))


def recorded_architecture(model: nn.Module, one: Arguments, two: Arguments) -> Architecture:
    """The architecture of such a model, from calls with one image and with two images."""
    first = flat_inputs(one)
    shared: list[str] = []
    repeated: dict[str, int] = {}
    for name, tensor in flat_inputs(two).items():
        more = len(tensor) - len(first[name]) if tensor.dim() else 0
        samples = samples_of(two) - samples_of(one)
        if not more:
            shared.append(name)
        elif more != samples:
            repeated[name] = more // samples
    plain = Architecture(block_classes(model), like(two), 1, tuple(shared), repeated, two)
    return replace(plain, example=like(two, plain))
