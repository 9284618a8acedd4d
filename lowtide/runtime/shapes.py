"""Calls that move pixels: upsampling, padding, and values side by side."""

from dataclasses import replace

import torch

from lowtide.models.trace import Node
from lowtide.runtime.layouts import Padding, channel_axis, layout_of, pixel_shape
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View
from lowtide.runtime.producers import Joined
from lowtide.runtime.torch_calls import arguments_of


def dropout(lowering: Lowering, node: Node) -> View | None:
    """A dropout that is switched off gives its input."""
    arguments = arguments_of(node, ("input", "p", "training", "inplace"))
    is_off = not arguments.get("training", True) or not arguments.get("p", 0.5)
    return lowering.given(arguments["input"]) if is_off else None


def contiguous(lowering: Lowering, node: Node) -> View | None:
    """The same values: in which order they lie is the program's own business."""
    is_plain = len(node.args) == 1 and not node.kwargs
    return lowering.given(node.args[0]) if is_plain and not lowering.writes.any else None


def interpolate(lowering: Lowering, node: Node) -> View | None:
    """Each pixel of an image batch (B, C, H, W) twice in both directions."""
    view = lowering.given(arguments_of(node, ("input",))["input"])
    shape = lowering.result_shape(node)
    is_nearest = node.kwargs.get("mode", "nearest") == "nearest"
    is_doubled = list(shape[2:]) == [2 * size for size in view.shape[2:]]
    chain = lowering.chain(view) if view.meta.dim() == 4 else None
    if chain is None or not is_nearest or not is_doubled or not chain.is_unshaped:
        return None
    doubled = replace(chain, upsample=2, steps=[], codes={})
    return lowering.draft.wait(_image(shape, view.meta.dtype), doubled)


def pad(lowering: Lowering, node: Node) -> View | None:
    """Zeros around an image batch (B, C, H, W)."""
    arguments = arguments_of(node, ("input", "pad", "mode", "value"))
    view = lowering.given(arguments["input"])
    amounts = arguments["pad"]
    is_zero = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
    chain = lowering.chain(view) if view.meta.dim() == 4 else None
    is_around = len(amounts) == 4 and min(amounts) >= 0
    if chain is None or not is_zero or not is_around or chain.norm is not None:
        return None
    left, right, above, below = amounts
    padding = chain.padding.plus(Padding(above, left, below, right))
    padded = replace(chain, padding=padding, steps=[], codes={})
    return lowering.draft.wait(_image(lowering.result_shape(node), view.meta.dtype), padded)


def join(lowering: Lowering, node: Node) -> View | None:
    """Two values side by side in their channels."""
    arguments = arguments_of(node, ("tensors", "dim"))
    parts = [lowering.given(part) for part in arguments["tensors"]]
    dims = parts[0].meta.dim()
    axis = arguments.get("dim", 0) % dims
    channels = 1 if dims == 4 else dims - 1
    if len(parts) != 2 or axis != channels or dims not in (3, 4):
        return None
    if any(layout_of(part.meta) is None or channel_axis(part.meta) != axis for part in parts):
        return None
    shape = lowering.result_shape(node)
    kind = lowering.result_type(node)
    meta = _image(shape, kind) if dims == 4 else torch.empty(shape, dtype=kind, device="meta")
    return lowering.draft.wait(meta, Joined(parts))


def _image(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    batch, channels, height, width = shape
    return pixel_shape(batch, height, width, channels, dtype)
