"""Calls that a tracer would record with the batch of the example, in forms that leave it free."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class FreeBatch(TorchFunctionMode):
    """Within the context, `unflatten`, `squeeze` and `reshape` are traced for any batch.

    A tracer writes the sizes of `unflatten` down as numbers, the batch among them. It writes a
    branch for `squeeze`, which ONNX Runtime refuses where the axis is longer than 1. Behind
    `reshape(batch, -1)`, OpenVINO does not know the width, and fails at a layer that reads it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in _REPLACED:
            return _REPLACED[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _unflatten(x: Tensor, dim: int, sizes: tuple[int, ...]) -> Tensor:
    place = dim % x.dim()
    return x.reshape(*x.shape[:place], *sizes, *x.shape[place + 1 :])


def _squeeze(x: Tensor, dim: int | None = None) -> Tensor:
    """Only the batch may change between calls; every other axis keeps its length."""
    if dim is None or dim % x.dim() == 0:
        return x.squeeze() if dim is None else x.squeeze(dim)
    return x if int(x.shape[dim]) != 1 else x.squeeze(dim)


def _reshape(x: Tensor, *sizes: Any, shape: Any = ()) -> Tensor:
    """The batch is what is left over where it stood first, so that all other sizes are numbers.

    A tracer gives sizes that it follows as tensors.
    """
    given = sizes or tuple(shape)
    wanted = tuple(given[0]) if len(given) == 1 and isinstance(given[0], Sequence) else given
    shaped = x.reshape(wanted)
    if not wanted or not isinstance(wanted[0], Tensor):
        return shaped
    if -1 not in [int(each) for each in wanted[1:]]:
        return shaped
    return x.reshape(-1, *[int(each) for each in shaped.shape[1:]])


_REPLACED: dict[Callable[..., Any], Callable[..., Tensor]] = {
    torch.unflatten: _unflatten,
    Tensor.unflatten: _unflatten,
    torch.squeeze: _squeeze,
    Tensor.squeeze: _squeeze,
    Tensor.reshape: _reshape,
}
