"""The input of a layer, as codes or float32: from what waits behind it, or what is in memory."""

from collections.abc import Callable
from dataclasses import replace

import torch

from lowtide.kernels import native_library
from lowtide.kernels.panels import PANEL
from lowtide.runtime.layouts import (
    NO_PADDING,
    Layout,
    Padding,
    code_layout,
    layout_of,
    pixels_of,
    tokens_of,
)
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View, new_view
from lowtide.runtime.producers import Attended, Chain, NormedRows, Product
from lowtide.runtime.steps import Output, Rounding


def image_codes(
    lowering: Lowering, view: View, rounding: Rounding | None, padding: Padding
) -> Output | None:
    """The codes of an image batch (B, C, H, W), with zeros around each image.

    Without a rounding its values, in the same layout.
    """
    chain = _chain(lowering, view, _gives_image)
    if chain is None:
        return None
    height, width = chain.padding.within(view.shape[2], view.shape[3])
    size = (height // chain.upsample, width // chain.upsample)
    return _chain_codes(lowering, chain, rounding, size, chain.padding.plus(padding))


def token_codes(lowering: Lowering, view: View, rounding: Rounding) -> Output | None:
    """The codes of tokens (B, ..., C), a pixel each."""
    rows = lowering.rows(view)
    if rows is not None:
        return _row_codes(lowering, rows, rounding)
    chain = _chain(lowering, view, _gives_tokens)
    if chain is None:
        return None
    folded = _fold(lowering, chain, view, rounding) or _fold_gated(lowering, chain, view, rounding)
    size = (chain.layouts[0].pixels, 1)
    return folded or _chain_codes(lowering, chain, rounding, size, NO_PADDING)


def image_floats(lowering: Lowering, view: View, padding: Padding) -> Output | None:
    """An image batch (B, C, H, W) in float32, with zeros around each image."""
    layout = pixels_of(view.meta)
    if layout is not None and padding == NO_PADDING and _is_readable(view, layout):
        return Output(lowering.draft.floats(view), layout)
    return image_codes(lowering, view, None, padding)


def token_floats(lowering: Lowering, view: View) -> Output | None:
    """Tokens (B, ..., C) in float32, a pixel each."""
    layout = tokens_of(view.meta)
    if layout is not None and _is_readable(view, layout):
        return Output(lowering.draft.floats(view), layout)
    chain = _chain(lowering, view, _gives_tokens)
    if chain is None:
        return None
    return _chain_codes(lowering, chain, None, (chain.layouts[0].pixels, 1), NO_PADDING)


def _is_readable(view: View, layout: Layout) -> bool:
    """Whether a product can read the values where they are: whole dwords of float32."""
    return view.meta.dtype == torch.float32 and layout.channels % 4 == 0


def _chain(lowering: Lowering, view: View, gives: Callable[[Chain, View], bool]) -> Chain | None:
    """The chain that waits behind the view, or one that reads it, if it gives these pixels."""
    if not lowering.are_floats(view):
        return None
    for chain in (lowering.waiting_chain(view), lowering.reading(view)):
        if chain is not None and gives(chain, view):
            return chain
    return None


def _gives_image(chain: Chain, view: View) -> bool:
    """Whether the channels of the view are those of the chain, and its pixels in the same order."""
    batch, channels, height, width = view.shape
    is_alike = chain.layouts[0].batch == batch and chain.channels == channels
    is_inside = channels == 1 or view.meta.stride(1) == 1
    height, width = chain.padding.within(height, width)
    size = (height // chain.upsample, width // chain.upsample)
    return is_alike and is_inside and _has_size(chain, *size)


def _gives_tokens(chain: Chain, view: View) -> bool:
    """Whether the last axis of the view has the channels of the chain, and each token a pixel."""
    first = chain.layouts[0]
    is_alike = first.batch == view.shape[0] and chain.channels == view.shape[-1]
    is_inside = chain.channels == 1 or view.meta.stride(-1) == 1
    return is_alike and is_inside and chain.is_unshaped and _has_size(chain, first.pixels, 1)


def _has_size(chain: Chain, height: int, width: int) -> bool:
    return all(layout.reshaped(height, width) is not None for layout in chain.layouts)


def _chain_codes(
    lowering: Lowering,
    chain: Chain,
    rounding: Rounding | None,
    size: tuple[int, int],
    padding: Padding,
) -> Output:
    """The codes of these pixels; a second layer with the same grid reads the same codes."""
    key = (rounding and rounding.key, size, padding)
    if key not in chain.codes:
        height, width = size
        first = chain.layouts[0]
        image = replace(first, height=height, width=width, channels=chain.channels)
        output = _place(lowering, image, rounding, padding, chain.upsample)
        chain.store(lowering.draft, output)
        chain.codes[key] = output
    return chain.codes[key]


def _row_codes(lowering: Lowering, rows: NormedRows, rounding: Rounding) -> Output:
    key = (rounding.key,)
    if key not in rows.codes:
        output = _place(lowering, rows.layout, rounding)
        rows.store(lowering.draft, output)
        rows.codes[key] = output
    return rows.codes[key]


def _fold(lowering: Lowering, chain: Chain, view: View, rounding: Rounding) -> Output | None:
    """The activation and the rounding in the epilogue of the product that the chain reads."""
    source = chain.sources[0]
    is_free = chain.is_plain and len(chain.sources) == 1 and not chain.steps
    if not is_free or not lowering.draft.is_read_once(view.buffer):
        return None
    attended = lowering.draft.waiting.get(source.buffer)
    if isinstance(attended, Attended):
        return _fold_attention(lowering, attended, chain, rounding)
    product = lowering.product(source)
    if product is None:
        return None
    step = product.step
    # The kernel applies the activation before the gate, the residual and the factor.
    ends = step.gate is None and step.residual is None and step.factor == 1.0
    if not ends and chain.activation != native_library.IDENTITY:
        return None
    step.activation = chain.activation
    step.output = _place(lowering, step.output.layout, rounding)
    lowering.draft.floats(source)
    return step.output


def _fold_attention(
    lowering: Lowering, attended: Attended, chain: Chain, rounding: Rounding
) -> Output | None:
    """The rounding in the attention that the chain reads, if codes lie as the results do."""
    step = attended.step
    source = chain.sources[0]
    is_alone = chain.activation == native_library.IDENTITY and rounding.smooth is None
    layout = code_layout(chain.layouts[0])
    is_all = source.meta.numel() == step.output.meta.numel() and source.meta.is_contiguous()
    is_alone = is_alone and lowering.target.folds
    if not is_alone or not is_all or layout != chain.layouts[0]:
        return None
    codes = new_view(torch.empty(_size(layout), dtype=torch.uint8, device="meta"))
    meta = step.output.meta
    whole = torch.empty(codes.meta.numel(), dtype=torch.uint8, device="meta")
    step.output = View(codes.buffer, whole.as_strided(meta.shape, meta.stride(), 0))
    step.rounding = rounding
    lowering.draft.floats(source)
    return Output(codes, layout, rounding)


def _fold_gated(lowering: Lowering, chain: Chain, view: View, rounding: Rounding) -> Output | None:
    """A gated unit whose halves are columns of one product, in the epilogue of that product."""
    gate = chain.sources[0]
    product = lowering.draft.waiting.get(gate.buffer)
    if not isinstance(product, Product) or not product.is_bare or chain.steps:
        return None
    if not lowering.target.folds:
        return None
    read = [gate, view] if chain.activated is None else [gate, view, chain.activated]
    are_read_once = all(lowering.draft.is_read_once(each.buffer) for each in read)
    if not are_read_once or not _are_halves(chain, lowering.draft.wholes[gate.buffer]):
        return None
    step = product.step
    halves = replace(step.output.layout, channels=chain.channels)
    step.gated = True
    step.activation = chain.activation
    step.output = _place(lowering, halves, rounding)
    lowering.draft.floats(gate)
    return step.output


def _are_halves(chain: Chain, whole: View) -> bool:
    """Whether a chain is the second half of the channels of `whole`, times the first half."""
    if chain.times is None or chain.norm is not None or not chain.is_unshaped:
        return False
    half = chain.channels
    of_whole = layout_of(whole.meta)
    parts = [(chain.times, 0), (chain.sources[0], half)]
    if half % PANEL or of_whole is None or of_whole.channels != 2 * half:
        return False
    layout = replace(of_whole, channels=half)
    return all(
        part.buffer is whole.buffer
        and part.meta.storage_offset() == first
        and layout_of(part.meta) == layout
        for part, first in parts
    )


def _place(
    lowering: Lowering,
    image: Layout,
    rounding: Rounding | None,
    padding: Padding = NO_PADDING,
    upsample: int = 1,
) -> Output:
    """A new place for the codes of an image, with their sums on a card; else for floats."""
    layout = code_layout(image, upsample, padding, 0 if rounding is None else rounding.room)
    kind = torch.float32 if rounding is None else lowering.target.code
    view = new_view(torch.empty(_size(layout), dtype=kind, device="meta"))
    sums = None
    if rounding is not None and lowering.target.has_sums:
        sums = new_view(torch.empty(layout.batch * layout.pixels, device="meta"))
    return Output(view, layout, rounding, padding, upsample, sums)


def _size(layout: Layout) -> int:
    return layout.batch * layout.sample
