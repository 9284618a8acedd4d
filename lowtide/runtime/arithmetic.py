"""Sums and products that join the epilogue of a layer, the gain of a norm, or a gated unit."""

import math
from dataclasses import replace
from typing import Any

import torch

from lowtide.models.trace import Node, Ref
from lowtide.runtime.layouts import (
    Layout,
    channel_axis,
    dense_like,
    is_dense,
    layout_of,
    same_order,
    vector_over,
)
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.memory import View


def add(lowering: Lowering, node: Node) -> View | None:
    """A vector of each sample or a residual on a layer's product; a shift after a layer norm."""
    for view, other in _operands(lowering, node):
        if not isinstance(other, View):
            continue
        added = _add_to_product(lowering, view, other) or _shift_rows(lowering, view, other)
        if added is not None:
            return added
    return None


def multiply(lowering: Lowering, node: Node) -> View | None:
    """A gate of a layer's product, a gain after a layer norm, a gated unit, or a factor."""
    for view, other in _operands(lowering, node):
        scaled = _times if isinstance(other, View) else _scaled
        result = scaled(lowering, view, other)
        if result is not None:
            return result
    return None


def divide(lowering: Lowering, node: Node) -> View | None:
    """A division by a power of two, which is a multiplication to the last bit."""
    if node.kwargs or len(node.args) != 2 or not isinstance(node.args[0], Ref):
        return None
    view = lowering.given(node.args[0])
    number = node.args[1]
    is_exact = _is_number(number) and _is_power_of_two(number)
    return _scaled(lowering, view, 1 / number) if is_exact else None


def _operands(lowering: Lowering, node: Node) -> list[tuple[View, Any]]:
    """The operands of a commutative call, both ways; the first has the result's shape and type."""
    if node.kwargs or len(node.args) != 2:
        return []
    shape = lowering.result_shape(node)
    ways = [
        (lowering.given(one), lowering.given(other))
        for one, other in (node.args, node.args[::-1])
        if isinstance(one, Ref)
    ]
    kind = lowering.result_type(node)
    return [(view, other) for view, other in ways if (view.shape, view.meta.dtype) == (shape, kind)]


def _add_to_product(lowering: Lowering, view: View, other: View) -> View | None:
    product = lowering.product(view)
    if product is None or not lowering.are_floats(other):
        return None
    vector = _vector(product.step.output.layout, view, other)
    if vector is not None and product.can_add_per_sample():
        product.step.per_sample = vector
        return view
    is_alike = other.shape == view.shape and same_order(view.meta, other.meta)
    is_apart = is_dense(other.meta) and other.buffer is not view.buffer
    if is_alike and is_apart and product.can_add_residual():
        product.step.residual = other
        return view
    return None


def _vector(layout: Layout, view: View, other: View) -> View | None:
    """`other` as a vector of each sample or of all, if the view has the samples of the layout."""
    vector = vector_over(other.meta, view.meta)
    if vector is None or vector.shape[1] != layout.channels:
        return None
    return View(other.buffer, vector) if vector.shape[0] in (1, layout.batch) else None


def _shift_rows(lowering: Lowering, view: View, other: View) -> View | None:
    """A shift of each sample after a layer norm."""
    rows = lowering.rows(view)
    is_float = lowering.are_floats(other)
    vector = _vector(rows.layout, view, other) if rows is not None and is_float else None
    if rows is None or vector is None or rows.shift is not None or rows.gain is None:
        return None
    shifted = replace(rows, shift=vector, steps=[], codes={})
    return lowering.draft.wait(torch.empty_like(view.meta), shifted)


def _times(lowering: Lowering, view: View, other: View) -> View | None:
    if not lowering.are_floats(view, other):
        return None
    return (
        _gate_product(lowering, view, other)
        or _gain_rows(lowering, view, other)
        or _gated_unit(lowering, view, other)
    )


def _gate_product(lowering: Lowering, view: View, other: View) -> View | None:
    product = lowering.product(view)
    vector = None if product is None else _vector(product.step.output.layout, view, other)
    if product is None or vector is None or not product.can_gate():
        return None
    product.step.gate = vector
    return view


def _gain_rows(lowering: Lowering, view: View, other: View) -> View | None:
    """A gain of each sample after a layer norm."""
    rows = lowering.rows(view)
    vector = None if rows is None else _vector(rows.layout, view, other)
    if rows is None or vector is None or rows.gain is not None or rows.shift is not None:
        return None
    gained = replace(rows, gain=vector, steps=[], codes={})
    return lowering.draft.wait(torch.empty_like(view.meta), gained)


def _gated_unit(lowering: Lowering, view: View, other: View) -> View | None:
    """An activation times another value of the same shape."""
    chain = lowering.waiting_chain(view)
    is_free = chain is not None and chain.times is None and chain.is_unshaped
    layout = layout_of(other.meta)
    is_alike = other.shape == view.shape and channel_axis(other.meta) == channel_axis(view.meta)
    if chain is None or not is_free or layout is None or not is_alike:
        return None
    first = chain.layouts[0]
    found = (layout.batch, layout.pixels, layout.channels)
    if found != (first.batch, first.pixels, chain.channels) or layout.as_line() is None:
        return None
    gated = replace(chain, times=other, activated=view, steps=[], codes={})
    return lowering.draft.wait(dense_like(view.meta), gated)


def _scaled(lowering: Lowering, view: View, number: Any) -> View | None:
    """The view times a number, in the epilogue of the product before it."""
    if not _is_number(number):
        return None
    if number == 1 and view.meta.is_floating_point():
        return view
    product = lowering.product(view)
    if product is None:
        return None
    product.step.factor *= float(number)
    return view


def _is_number(number: object) -> bool:
    return isinstance(number, int | float) and not isinstance(number, bool)


def _is_power_of_two(number: float) -> bool:
    return number != 0 and math.frexp(abs(number))[0] == 0.5
