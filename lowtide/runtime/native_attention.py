"""Attention whose query, key, value and softmax are rounded."""

import math
from typing import Any

import torch
from torch import Tensor

from lowtide.formats import Adaptive, Affine
from lowtide.kernels import native_library
from lowtide.models.trace import Node
from lowtide.nn.attention import QuantAttention
from lowtide.runtime.attention_step import AttentionStep
from lowtide.runtime.layouts import code_layout
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import Buffer, View, new_view, same_strides
from lowtide.runtime.producers import Attended, Product
from lowtide.runtime.steps import Output, Rounding
from lowtide.runtime.torch_calls import arguments_of

WIDEST_HEAD = 256  # that a card takes
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")


def attention(lowering: Lowering, node: Node) -> View | None:
    """Attention (B, heads, tokens, width) in a block with rounded operands."""
    arguments = arguments_of(node, NAMES)
    processor = _processor(lowering, arguments["query"].id)
    if processor is None:
        return None
    operands = [lowering.given(arguments[name]) for name in ("query", "key", "value")]
    mask = lowering.given(arguments.get("attn_mask"))
    if not _is_covered(processor, arguments, operands, mask) or not _fits(lowering, operands, mask):
        return lowering.run_in_torch(node, processor.attend)
    step = _step(lowering, processor, operands, mask, arguments.get("scale"))
    return lowering.draft.wait_for(step.output, Attended(step))


def _processor(lowering: Lowering, query: int) -> QuantAttention | None:
    """The processor of the attention block whose layers gave the query."""
    leaves = lowering.graph.values[query].last_leaves
    for name, module in lowering.root.named_modules():
        processor = getattr(module, "processor", None)
        is_inside = any(leaf.startswith(f"{name}.") for leaf in leaves)
        if is_inside and isinstance(processor, QuantAttention):
            return processor
    return None


def _is_covered(
    processor: QuantAttention,
    arguments: dict[str, Any],
    operands: list[View],
    mask: View | Tensor | None,
) -> bool:
    parts = processor.quantizers()
    is_affine = all(isinstance(parts[name].format, Affine) for name in ("q", "k", "v"))
    is_rounded = isinstance(parts["softmax"].format, Affine | Adaptive)
    is_plain = not arguments.get("dropout_p") and not arguments.get("is_causal")
    # The kernel takes the largest product for the largest score.
    is_plain = is_plain and (arguments.get("scale") or 1) > 0
    is_inside = all(view.meta.dim() == 4 and view.meta.stride(-1) == 1 for view in operands)
    if not (is_affine and is_rounded and is_plain and is_inside):
        return False
    return mask is None or (isinstance(mask, View) and _is_key_bias(mask.meta, *operands[:2]))


def _fits(lowering: Lowering, operands: list[View], mask: View | Tensor | None) -> bool:
    """Whether the kernels of this machine take these types and heads of this width."""
    views = [*operands, *([mask] if isinstance(mask, View) else [])]
    is_narrow = lowering.target.folds or operands[0].shape[-1] <= WIDEST_HEAD
    return lowering.are_floats(*views) and is_narrow


def _is_key_bias(mask: Tensor, query: View, key: View) -> bool:
    """Whether a mask (B or 1, heads or 1, 1, keys) is a number added to the scores of each key."""
    batch, heads = query.shape[:2]
    if mask.dim() != 4 or not mask.dtype.is_floating_point or mask.shape[3] != key.shape[2]:
        return False
    fits = mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads)
    return fits and mask.shape[2] == 1 and mask.stride(3) == 1


def _step(
    lowering: Lowering,
    processor: QuantAttention,
    operands: list[View],
    mask: View | None,
    scale: float | None,
) -> AttentionStep:
    parts = processor.quantizers()
    roundings = {name: lowering.numbers.rounding(part) for name, part in parts.items()}
    grids = [roundings[name] for name in ("q", "k", "v")]
    views = [_operand(lowering, *each) for each in zip(operands, grids, strict=True)]
    batch, heads, queries, width = views[0].shape
    # The result is read as (B, tokens, heads * width).
    meta = torch.empty(batch, queries, heads, width, device="meta").transpose(1, 2)
    step = AttentionStep(
        *views,
        output=new_view(same_strides(meta, operands[0].meta.dtype)),
        roundings=roundings,
        adaptive=isinstance(processor.softmax.format, Adaptive),
        factor=scale or 1 / math.sqrt(width),
        bias=None if mask is None else lowering.draft.floats(mask),
        scratch=View(Buffer(0), torch.empty(0, dtype=torch.uint8, device="meta")),
    )
    if lowering.target.folds:
        size = native_library.native().attention_scratch(step.structure(lambda view: 0))
        step.scratch = new_view(torch.empty(size, dtype=torch.uint8, device="meta"))
    return step


def _operand(lowering: Lowering, view: View, rounding: Rounding) -> View:
    """The operand as codes, if its layer can store them and nobody else reads it; else floats."""
    draft = lowering.draft
    product = draft.waiting.get(view.buffer)
    if not lowering.target.folds:
        return draft.floats(view)
    if not isinstance(product, Product) or not draft.is_read_once(view.buffer):
        return draft.floats(view)
    step = product.step
    whole = draft.wholes[view.buffer]
    layout = code_layout(step.output.layout)
    if view.meta.numel() != whole.meta.numel() or layout != step.output.layout:
        return draft.floats(view)
    codes = torch.empty(whole.meta.numel(), dtype=torch.uint8, device="meta")
    step.output = Output(new_view(codes), layout, rounding)
    draft.floats(view)
    place = view.meta.storage_offset()
    return View(step.output.view.buffer, codes.as_strided(view.shape, view.meta.stride(), place))
