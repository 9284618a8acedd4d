"""Models whose float parts are in half precision: a program computes them in float32.

Inputs and parameters become float32, which is exact, and the answer gets the type that the forward
pass gives it. Between the two nothing is rounded to half precision, so a program is nearer to the
model in float32 than the layers one by one are.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.models.trace import mapped
from lowtide.nn.packed import PackedConv2d, PackedLinear

HALVES = frozenset({torch.bfloat16, torch.float16})


@dataclass
class Widening:
    """Gives float32 for the half types of a model; a model without any keeps all its types."""

    halves: frozenset[torch.dtype]
    tensors: dict[int, Tensor] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, root: nn.Module) -> "Widening":
        return cls(HALVES & {parameter.dtype for parameter in root.parameters()})

    def type(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype in self.halves else dtype

    def argument(self, leaf: Any) -> Any:
        """An argument of a call: a tensor of the model, a type, or anything else."""
        if isinstance(leaf, torch.dtype):
            return self.type(leaf)
        return self.tensor(leaf) if isinstance(leaf, Tensor) else leaf

    def tensor(self, tensor: Tensor) -> Tensor:
        """The tensor in float32; the same one at each call."""
        if tensor.dtype not in self.halves:
            return tensor
        if id(tensor) not in self.tensors:
            self.tensors[id(tensor)] = tensor.detach().float()
            self.kept.append(tensor)
        return self.tensors[id(tensor)]

    def layer(self, module: nn.Module) -> Callable[..., Any]:
        """The module on float32. A float layer gets a copy; others run in their own type."""
        kinds = self.halves & {parameter.dtype for parameter in module.parameters()}
        if not kinds or isinstance(module, PackedLinear | PackedConv2d):
            return module
        if type(module) in (nn.Linear, nn.Conv2d):
            return copy.deepcopy(module).float()
        [half, *_] = kinds
        return InItsOwnType(module, half)


@dataclass(frozen=True)
class InItsOwnType:
    """A module that has to compute in half precision, called with float32."""

    module: nn.Module
    dtype: torch.dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = mapped((args, kwargs), lambda leaf: _cast(leaf, torch.float32, self.dtype))
        result = self.module(*given[0], **given[1])
        return mapped(result, lambda leaf: _cast(leaf, self.dtype, torch.float32))


def _cast(leaf: Any, before: torch.dtype, after: torch.dtype) -> Any:
    return leaf.to(after) if isinstance(leaf, Tensor) and leaf.dtype == before else leaf
