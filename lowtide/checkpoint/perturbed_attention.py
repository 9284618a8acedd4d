"""Perturbed attention guidance (PAG) on a packed model: the perturbed attention is rounded too.

PAG assigns `module.processor` and passes by `set_processor`. torch refuses that where the processor
is a module, as that of a rounded attention is.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import wrapt
from torch import nn


def wrap(module: ModuleType) -> None:
    """Let diffusers' PAG set processors of rounded attentions."""
    wrapt.wrap_function_wrapper(module, "PAGMixin._set_pag_attn_processor", _rounded_too)


def _rounded_too(wrapped: Callable[..., Any], pipe: Any, args: tuple, kwargs: dict) -> Any:
    denoiser: nn.Module = getattr(pipe, "unet", None) or pipe.transformer
    with _assignable(denoiser):
        return wrapped(*args, **kwargs)


@contextmanager
def _assignable(root: nn.Module) -> Iterator[None]:
    """Within the context, processors are plain attributes; afterwards new ones are rounded."""
    # The import comes late: this module is imported while diffusers is still being imported.
    from lowtide.nn.attention import QuantAttention

    found: list[tuple[Any, Any]] = []
    for module in root.modules():
        processor = module._modules.get("processor")
        if isinstance(processor, QuantAttention):
            found.append((module, processor))
    for block, processor in found:
        del block._modules["processor"]
        block.__dict__["processor"] = processor
    try:
        yield
    finally:
        given = [block.__dict__.pop("processor") for block, _ in found]
        for block, processor in found:
            block._modules["processor"] = processor
        for (block, processor), new in zip(found, given, strict=True):
            if new is not processor:
                block.set_processor(new)
