"""Keep text encoders and decoder off the device while they are not at work.

accelerate brings each one there when it is called. Here it leaves when the denoiser is called next,
or when the pipeline is used no more.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from torch import nn

from lowtide.machine.devices import CPU, empty_cache
from lowtide.sampling.drivers import denoiser
from lowtide.sampling.pipelines import ModulePipeline, Pipeline


def other_parts(pipe: Pipeline) -> dict[str, nn.Module]:
    """The networks of a pipeline besides its denoiser, by name."""
    if isinstance(pipe, ModulePipeline):
        return {}
    components: Mapping[str, object] = cast(Any, pipe).components
    return {
        name: part
        for name, part in components.items()
        if isinstance(part, nn.Module) and part is not denoiser(pipe)
    }


@contextmanager
def parts_apart(pipe: Pipeline, device: torch.device) -> Iterator[None]:
    """Within the context, each other part is on the device only while it is at work.

    Afterwards all are on the device.
    """
    parts = other_parts(pipe)
    if not parts or device == CPU:
        yield
        return
    for part in parts.values():
        part.to(CPU)
    empty_cache(device)
    hooks = [cpu_offload_with_hook(part, device)[1] for part in parts.values()]
    leaving = denoiser(pipe).register_forward_pre_hook(_leave(list(parts.values()), device))
    try:
        yield
    finally:
        leaving.remove()
        for part, hook in zip(parts.values(), hooks, strict=True):
            hook.remove()
            remove_hook_from_module(part)
            part.to(device)


def _leave(parts: list[nn.Module], device: torch.device) -> Callable[..., None]:
    """A hook of the denoiser: the other parts leave the device."""

    def leave(module: nn.Module, args: tuple[object, ...]) -> None:
        present = [part for part in parts if next(part.parameters()).device != CPU]
        for part in present:
            part.to(CPU)
        if present:
            empty_cache(device)

    return leave
