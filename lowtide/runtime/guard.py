"""The guard: why a call of a fused denoiser runs layer by layer."""

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.models.named_inputs import flat_inputs
from lowtide.nn.clock import Clock
from lowtide.runtime.half import HALVES
from lowtide.runtime.side_layers import SideLayers

FLOATS = HALVES | {torch.float32}


def unfollowed_inputs(inputs: Mapping[str, Any], device: torch.device | None = None) -> str:
    """Why no program on this device takes these inputs; empty if one can."""
    kinds = {"cpu", device.type} if device is not None else {"cpu"}
    strange = [name for name, value in inputs.items() if not _is_followed(value, kinds)]
    if strange:
        return f"it got {strange[0]}, which lowtide does not follow"
    if any(tensor.numel() == 0 for tensor in flat_inputs(inputs).values()):
        return "an input is empty"
    return ""


def _is_followed(value: Any, kinds: set[str]) -> bool:
    if isinstance(value, Mapping):
        return all(_is_followed(each, kinds) for each in value.values())
    if isinstance(value, Tensor):
        return value.device.type in kinds
    return is_setting(value)


def is_setting(value: Any) -> bool:
    """Whether an input is a number, a word or a switch, for which a program is made."""
    return value is None or isinstance(value, bool | int | float | str)


def unfollowed_mode(root: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Why torch must see each layer: it trains, or a mode of torch looks on. Empty if not."""
    if root.training:
        return "it is in training mode"
    if torch.is_grad_enabled() and _wants_gradients(root, inputs):
        return "gradients are wanted; call it within torch.no_grad()"
    kind = next(root.parameters()).device.type
    if torch._C._len_torch_function_stack() or torch.is_autocast_enabled(kind):
        return "a mode of torch is active"
    return ""


def _wants_gradients(root: nn.Module, inputs: Mapping[str, Any]) -> bool:
    tensors = [*flat_inputs(inputs).values(), *root.parameters()]
    return any(tensor.requires_grad for tensor in tensors)


def placed_by_hooks(root: nn.Module) -> str:
    """Why a program would find no weights: offloading replaces the forward pass of modules."""
    inner = (module for module in root.modules() if module is not root)
    if any("forward" in module.__dict__ for module in inner):
        return "a hook in the place of a forward pass moves or casts its weights"
    return ""


def compiled_parts(root: nn.Module) -> str:
    """Why a program would pass over what was compiled: `compile_repeated_blocks` compiles parts."""
    inner = (module for module in root.modules() if module is not root)
    if any(module._compiled_call_impl is not None for module in inner):
        return "torch.compile compiled parts of it"
    return ""


class Modules:
    """The modules of a denoiser as they were when its programs were prepared."""

    def __init__(self, root: nn.Module, clock: Clock):
        self.root = root
        self.clock = clock
        self.modules = list(root.modules())
        # These run before every call, so the loops are Python's own.
        self.holders = [module._modules for module in self.modules]
        self.children = list(chain.from_iterable(map(dict.values, self.holders)))
        inner = self.modules[1:]
        self.hooks = [module._forward_hooks for module in inner]
        self.hooks += [module._forward_pre_hooks for module in inner]
        self.kinds = {each.dtype for each in root.parameters() if each.dtype.is_floating_point}

    def are_changed(self) -> bool:
        return list(chain.from_iterable(map(dict.values, self.holders))) != self.children

    def have_other_sides(self, sides: SideLayers) -> bool:
        """Whether the LoRAs beside the layers are others than these: programs are made again."""
        return sides.is_changed() or (self.are_changed() and sides.differ(self.root))

    def unfollowed(self) -> str:
        """Why they can no longer be run as a program; empty if they can."""
        if not self.kinds <= FLOATS:
            [strange, *_] = map(str, self.kinds - FLOATS)
            return f"a float layer is in {strange.removeprefix('torch.')}"
        if self.clock.keyed and self.clock.index.dim():
            return "its samples are at several timesteps"
        if self.are_changed():
            return "its modules were changed"
        if not any(self.hooks):
            return ""
        module = next(filter(_has_hooks, self.modules[1:]))
        return f"a {type(module).__name__} inside it has a hook"


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
