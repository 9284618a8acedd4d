"""IP-Adapters on a packed UNet: diffusers casts the whole UNet to its own type, which it may not.

Only the adapter's own weights are cast. Attention stays rounded (KeepRounding in nn/attention.py).
"""

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import wrapt
from torch import nn

LOADER = "UNet2DConditionLoadersMixin._load_ip_adapter_weights"


def wrap(module: ModuleType) -> None:
    """Make diffusers' loader accept a packed UNet."""
    wrapt.wrap_function_wrapper(module, LOADER, _into_packed)


def _into_packed(wrapped: Callable[..., Any], unet: Any, args: tuple, kwargs: dict) -> Any:
    """Load the adapter, with a cast of the UNet that leaves codes and tables alone."""
    # The import comes late: this module is imported while diffusers is still being imported.
    from lowtide.checkpoint.diffusers_hook import LowtideQuantizer

    if not isinstance(getattr(unet, "hf_quantizer", None), LowtideQuantizer):
        return wrapped(*args, **kwargs)
    unet.__dict__["to"] = partial(_cast_adapter, unet)
    try:
        return wrapped(*args, **kwargs)
    finally:
        del unet.__dict__["to"]


def _cast_adapter(unet: Any, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Cast what the adapter added: its projection, and processors with weights."""
    processors = unet.attn_processors.values()
    for part in (unet.encoder_hid_proj, *processors):
        if isinstance(part, nn.Module):
            part.to(dtype=dtype, device=device)
    return unet
