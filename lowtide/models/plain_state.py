"""What a module keeps beside its parameters: plain tensors, and cached answers of methods."""

from collections.abc import Iterator
from functools import _lru_cache_wrapper
from inspect import getclosurevars, isfunction

from torch import Tensor, nn


def constants(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors without data that a module made on the meta device holds as plain attributes."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_meta:
                yield f"{name}.{attribute}".removeprefix("."), value


def forget_answers(model: nn.Module) -> None:
    """Clear the caches of methods with `lru_cache`: their tensors are of another recording."""
    for kind in {type(module) for module in model.modules()}:
        for method in vars(kind).values():
            # diffusers puts a function around the cache, which then is a variable of its closure.
            inner = getclosurevars(method).nonlocals if isfunction(method) else {}
            for each in (method, *inner.values()):
                if isinstance(each, _lru_cache_wrapper):
                    each.cache_clear()
