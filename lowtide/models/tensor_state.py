"""What a call that writes in place may change of a tensor."""

from typing import NamedTuple

import torch
from torch import Tensor


class TensorState(NamedTuple):
    """Compare two of them: `version` says that values were written, the rest that it was moved."""

    version: int
    memory: int
    shape: torch.Size
    strides: tuple[int, ...]
    start: int

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorState":
        # Tensors of the inference mode count no writes.
        version = 0 if tensor.is_inference() else tensor._version
        start = int(tensor.storage_offset())
        return cls(version, memory_of(tensor), tensor.shape, tensor.stride(), start)

    @property
    def form(self) -> tuple[object, ...]:
        return self[1:]


def memory_of(tensor: Tensor) -> int:
    """Equal for two tensors that share memory, while both exist."""
    return tensor.untyped_storage()._cdata
