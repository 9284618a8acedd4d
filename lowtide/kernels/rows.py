"""The rows of a weight: the bits of each row's codes, and what turns the codes into int8."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats import Mixed, WeightFormat
from lowtide.kernels.ops import Spec, zero_point


@dataclass(frozen=True)
class Rows:
    """What turns the codes of each row into int8, and its scale.

    bits: of each row, int32; doubled: of each row, whether a code counts twice; zero: (rows,)
    int32; scale: (rows,); factor: rows x groups of `group` columns of the checkpoint, or None.
    """

    bits: Tensor
    doubled: Tensor
    zero: Tensor
    scale: Tensor
    factor: Tensor | None
    group: int

    @property
    def keeps_bits(self) -> bool:
        """Whether the kernels keep the bits of the checkpoint in memory; else they keep int8."""
        return self.factor is None and int(self.bits.min()) < 8

    @property
    def fits(self) -> bool:
        """Whether every value that a code can stand for is an int8."""
        tops = (2**self.bits - 1) << self.doubled
        factor = 1 if self.factor is None else self.factor.amax(1).to(torch.int32)
        highest = ((tops - self.zero) * factor).amax()
        lowest = (-self.zero * factor).amin()
        return int(highest) <= 127 and int(lowest) >= -128


def rows_of(scale: Tensor, zero: Tensor, factor: Tensor | None, format: WeightFormat) -> Rows:
    """The rows of a weight with these tables, each (rows, 1) but for the factors of groups."""
    rows = len(scale)
    if isinstance(format, Mixed):
        bits = torch.tensor(format.bits, dtype=torch.int32)
    else:
        bits = torch.full((rows,), format.bits, dtype=torch.int32)
    half = bits == 1
    # A symmetric channel of one bit has the values plus and minus half a scale:
    # (2 * code - 1) * (scale / 2).
    symmetric = isinstance(format, Mixed) or format.signed
    doubled = half if symmetric else torch.zeros_like(half)
    scales = torch.where(doubled, scale.flatten() / 2, scale.flatten())
    zeros = torch.where(doubled, 1.0, zero.flatten().expand(rows).float())
    group = format.group or 0
    integers = zeros.to(torch.int32)
    return Rows(bits, doubled, integers, scales.float().contiguous(), factor, group)


def rows_of_grid(grid: list[Tensor], spec: Spec) -> Rows:
    """The rows of a weight from the tables of its layer."""
    scale, zero, factor, _ = grid
    point = zero if zero.numel() else zero_point(spec.weight, scale, factor)
    return rows_of(scale, point, factor if factor.numel() else None, spec.weight)
