"""Codes of a checkpoint as the integer constants of other runtimes, which have 4 or 8 bits.

Codes of up to 4 bits become 4-bit integers and all others 8-bit ones. Signed formats become signed
integers without a zero point, which integer kernels like best.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowtide.exporting.traced_operators import stored_weight
from lowtide.formats import Affine, Grid, Mixed, unpack
from lowtide.kernels import Spec
from lowtide.kernels.ops import unpack_codes, zero_point
from lowtide.nn.feature_cache import Cached
from lowtide.nn.packed import Packed

SMALL = 4  # bits


class Constant(NamedTuple):
    """The arguments of the operator `stored_weight`."""

    codes: Tensor
    zero: Tensor
    scale: Tensor
    bits: int


@dataclass(frozen=True)
class StoredValues:
    """Constants and how they become one tensor of values.

    The constants are parts of its rows, in the given order. Groups of columns may have integer
    factors; `columns` of the groups are values, and the rest is padding.
    """

    shape: tuple[int, ...]
    constants: tuple[Constant, ...]
    order: Tensor | None = None
    factor: Tensor | None = None
    columns: int = 0

    def values(self, reader: Tensor) -> Tensor:
        """The values, by operators that a trace records; `reader` is an input of the layer."""
        parts = [stored_weight(reader, *constant) for constant in self.constants]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.order is not None:
            values = values.index_select(0, self.order)
        if self.factor is not None:
            values = (values * self.factor).flatten(1)[:, : self.columns]
        return values.reshape(self.shape)


class CodeRows(NamedTuple):
    """Some rows of codes, as float, with a scale and a zero point for each row: rows x 1."""

    codes: Tensor
    zero: Tensor
    scale: Tensor

    def part(self, rows: Tensor) -> "CodeRows":
        return CodeRows(self.codes[rows], self.zero[rows], self.scale[rows])

    def whole(self) -> "CodeRows":
        """Zero points of one half, of codes of 1 bit, as integers: codes count half steps."""
        half = self.zero % 1 != 0
        return CodeRows(
            torch.where(half, 2 * self.codes, self.codes),
            torch.where(half, 2 * self.zero, self.zero),
            torch.where(half, self.scale / 2, self.scale),
        )

    def constant(self, shape: Sequence[int], bits: int, *, signed: bool) -> Constant:
        """The rows as an integer tensor of this shape, whose first axis is the rows."""
        codes, zero, scale = self.whole()
        tables = (len(codes), *[1] * (len(shape) - 1))
        if signed:
            stored = (codes - zero).to(torch.int8).reshape(*shape)
            return Constant(stored, stored.new_zeros(()), scale.reshape(tables), bits)
        stored = codes.to(torch.uint8).reshape(*shape)
        zeros = zero.to(torch.uint8).reshape(tables)
        return Constant(stored, zeros, scale.reshape(tables), bits)


def storage_bits(bits: int) -> int:
    """The bits of an exported code."""
    return SMALL if bits <= SMALL else 8


def rows_of(layer: Packed) -> CodeRows:
    """The codes of a packed layer; the factors of groups are not in them."""
    spec = Spec.of(layer.spec)
    codes = unpack_codes(layer.codes(), spec).float()
    scale, zero, factor, _ = layer.tables()
    zeros = zero.float() if zero.numel() else zero_point(spec.weight, scale, factor)
    if isinstance(spec.weight, Mixed):
        zeros = spec.weight.steps(Grid(scale, zeros), codes.shape[1]).zero
    return CodeRows(codes, zeros.expand_as(scale), scale)


def stored_values_of(layer: Packed) -> StoredValues:
    """The weight of a packed layer, in the shape of its float layer."""
    format = Spec.of(layer.spec).weight
    shape = weight_shape(layer)
    rows = rows_of(layer)
    factor = layer.tables()[2]
    if isinstance(format, Mixed):
        return _mixed(rows, format, shape)
    if factor.numel():
        return _grouped(rows, factor, format, shape)
    bits = storage_bits(format.bits)
    return StoredValues(shape, (rows.constant(shape, bits, signed=format.signed),))


def weight_shape(layer: Packed) -> tuple[int, ...]:
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels, layer.channels, *layer.kernel_size)
    return tuple(layer.rows_and_columns())


def _mixed(rows: CodeRows, format: Mixed, shape: tuple[int, ...]) -> StoredValues:
    """Rows of 4 bits and rows of 8 bits, each stored together."""
    widths = torch.tensor([storage_bits(bits) for bits in format.bits])
    constants: list[Constant] = []
    places: list[Tensor] = []
    for bits in widths.unique().tolist():
        chosen = (widths == bits).nonzero().flatten()
        part_shape = (len(chosen), *shape[1:])
        constants.append(rows.part(chosen).constant(part_shape, bits, signed=format.signed))
        places.append(chosen)
    order = torch.cat(places).argsort() if len(places) > 1 else None
    return StoredValues(shape, tuple(constants), order)


def _grouped(
    rows: CodeRows, factor: Tensor, format: Affine, shape: tuple[int, ...]
) -> StoredValues:
    """Rows x groups x columns of a group; the last group is filled up with zeros."""
    assert format.group is not None
    count, columns = rows.codes.shape
    groups = factor.shape[1]
    padding = rows.zero.expand(count, groups * format.group - columns)
    filled = rows._replace(codes=torch.cat([rows.codes, padding], 1))
    grouped = (count, groups, format.group)
    constant = filled.constant(grouped, storage_bits(format.bits), signed=format.signed)
    factors = factor.float().unsqueeze(-1)
    return StoredValues(shape, (constant,), factor=factors, columns=columns)


def stored_features(cache: Cached) -> StoredValues | None:
    """The cached features of all calibrated steps, steps x width; None where they are floats."""
    form = cache.plan.format
    if form is None:
        return None
    steps = len(cache.clock.known)
    rows = steps * cache.plan.chunks
    codes = unpack(cache.weight[:rows], form.bits, cache.columns).float()
    table = CodeRows(codes, cache.zero[:rows].float(), cache.scale[:rows])
    bits = storage_bits(form.bits)
    constant = table.constant((rows, cache.columns), bits, signed=form.signed)
    return StoredValues((steps, cache.plan.width), (constant,))
