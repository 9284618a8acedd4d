"""Norms and activations: they wait for their readers, who may want codes alone."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from lowtide.kernels import native_library
from lowtide.models.trace import Node
from lowtide.runtime.layouts import channel_axis, dense_like, tokens_of
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View
from lowtide.runtime.producers import Chain, GroupNorm, NormedRows
from lowtide.runtime.torch_calls import arguments_of


def group_norm(lowering: Lowering, node: Node) -> View | None:
    """A norm over (B, C, ...), where the channels lie side by side."""
    arguments = arguments_of(node, ("input", "num_groups", "weight", "bias", "eps"))
    view = lowering.given(arguments["input"])
    sources = lowering.sources(view)
    if sources is None or channel_axis(view.meta) != 1:
        return None
    views, layouts = sources
    if any(layout.as_line() is None for layout in layouts):
        return None
    if _are_computed(lowering, arguments):
        return None
    weight = lowering.float32(arguments.get("weight"))
    bias = lowering.float32(arguments.get("bias"))
    norm = GroupNorm(arguments["num_groups"], arguments.get("eps", 1e-5), weight, bias)
    return lowering.draft.wait(dense_like(view.meta), Chain(views, layouts, norm))


def layer_norm(lowering: Lowering, node: Node) -> View | None:
    """A norm over the last axis of tokens (B, ..., C)."""
    arguments = arguments_of(node, ("input", "normalized_shape", "weight", "bias", "eps"))
    view = lowering.given(arguments["input"])
    layout = tokens_of(view.meta) if view.meta.dim() > 2 else None
    is_last_axis = len(arguments["normalized_shape"]) == 1
    if layout is None or not is_last_axis or not lowering.are_floats(view):
        return None
    if _are_computed(lowering, arguments):
        return None
    weight = lowering.float32(arguments.get("weight"))
    bias = lowering.float32(arguments.get("bias"))
    rows = NormedRows(view, layout, arguments.get("eps", 1e-5), weight, bias)
    meta = torch.empty(view.shape, dtype=view.meta.dtype, device="meta")
    return lowering.draft.wait(meta, rows)


def _are_computed(lowering: Lowering, arguments: Mapping[str, Any]) -> bool:
    """Whether weight or bias is the result of a call, such as a cast, and no parameter."""
    leaves = (arguments.get(name) for name in ("weight", "bias"))
    return any(isinstance(lowering.given(leaf), View) for leaf in leaves)


def activation(lowering: Lowering, node: Node) -> View | None:
    """SiLU or GELU: it joins the norm before it, or reads what is in memory."""
    view = lowering.given(arguments_of(node, ("input",))["input"])
    waiting = lowering.waiting_chain(view)
    joins = (
        waiting is not None
        and waiting.activation == native_library.IDENTITY
        and waiting.times is None
        and waiting.is_unshaped
    )
    before = waiting if joins else lowering.reading(view)
    if before is None:
        return None
    after = Chain(before.sources, before.layouts, before.norm, _activation_of(node))
    return lowering.draft.wait(dense_like(view.meta), after)


def _activation_of(node: Node) -> int:
    if node.target is F.silu:
        return native_library.SILU
    if node.kwargs.get("approximate") == "tanh":
        return native_library.GELU_TANH
    return native_library.GELU_ERF
