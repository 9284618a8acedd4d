"""`ControlNetModel.from_unet` of a packed UNet: it starts from the rounded weights, in float."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


def wrap(module: ModuleType) -> None:
    """Make `from_unet` of diffusers' ControlNetModel accept a packed UNet."""
    wrapt.wrap_function_wrapper(module, "ControlNetModel.from_unet", _from_packed)


def _from_packed(wrapped: Callable[..., Any], cls: type, args: tuple, kwargs: dict) -> Any:
    """Call `from_unet` with the float layers of the UNet, which it copies."""
    # The import comes late: this module is imported while diffusers is still being imported.
    from lowtide.checkpoint.diffusers_hook import LowtideQuantizer

    unet: Any = args[0] if args else kwargs.get("unet")
    if not isinstance(getattr(unet, "hf_quantizer", None), LowtideQuantizer):
        return wrapped(*args, **kwargs)
    plain = copy.deepcopy(unet).dequantize()
    others = {name: value for name, value in kwargs.items() if name != "unet"}
    return wrapped(plain, *args[1:], **others)
