"""Affine formats: value = (code - zero) * scale, per tensor, per output channel, or per group.

Codes are always unsigned, 0 .. 2^bits - 1. A signed format is symmetric: its zero point is the
middle code. An unsigned format learns its zero point, so its range may be asymmetric. In both,
(code - zero) times the factor of a group fits an int8 for weights of up to 8 bits (8-bit weights
are signed). So an int8 kernel with one float scale per channel can run all of them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The scale and zero point of the representable values, and the integer factors of groups.

    Scale and zero broadcast against rows x columns; factor is rows x groups.
    """

    scale: Tensor
    zero: Tensor
    factor: Tensor | None = None


def affine_grid(lo: Tensor, hi: Tensor, levels: int | Tensor, *, signed: bool) -> Grid:
    """The grid of `levels` values that covers [lo, hi] and holds zero exactly.

    The exception is one signed bit: its two values are plus and minus half a scale.
    """
    lo = lo.float().clamp(max=0)
    hi = hi.float().clamp(min=0)
    levels = torch.as_tensor(levels, device=lo.device, dtype=torch.float32)
    if signed:
        return _symmetric_grid(lo, hi, levels)
    scale = _positive((hi - lo) / (levels - 1))
    return Grid(scale, torch.minimum((-lo / scale).round(), levels - 1))


def _symmetric_grid(lo: Tensor, hi: Tensor, levels: Tensor) -> Grid:
    middle = levels // 2
    two_levels = 2 * torch.maximum(-lo, hi)
    more_levels = torch.maximum(-lo / middle, hi / (middle - 1).clamp(min=1))
    scale = torch.where(levels > 2, more_levels, two_levels)
    zero = torch.where(levels > 2, middle, 0.5)
    return Grid(_positive(scale), zero.expand_as(scale))


def _positive(scale: Tensor) -> Tensor:
    """The scale, or 1 for an all-zero channel: any scale holds its zeros, and 1 divides safely."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def affine_encode(x: Tensor, grid: Grid, top: int | Tensor) -> Tensor:
    """The nearest codes in 0 .. top, still as float."""
    last = torch.as_tensor(top, device=x.device, dtype=x.dtype)
    return (x / grid.scale + grid.zero).round_().clamp_(min=0).minimum(last)


@dataclass(frozen=True)
class Affine:
    """Codes of `bits` bits with a scale and a zero point.

    `axis` 0 gives each output channel its own scale. `group` gives each run of that many columns
    an integer factor of the channel's scale, from 1 to 15.
    """

    bits: int
    signed: bool = False
    axis: int | None = None
    group: int | None = None

    @property
    def top(self) -> int:
        """The last code."""
        return 2**self.bits - 1

    @property
    def largest_factor(self) -> int:
        """The largest factor of a group for which (code - zero) * factor is still an int8."""
        return max(1, min(15, 127 // 2 ** (self.bits - 1)))

    def rows(self, x: Tensor) -> Tensor:
        """The tensor as rows that each have their own range: 1, channels, or channels * groups."""
        flat = x.reshape(1, -1) if self.axis is None else x.flatten(1)
        if self.group is None:
            return flat
        padding = -flat.shape[1] % self.group
        return torch.nn.functional.pad(flat, (0, padding)).reshape(-1, self.group)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        """The grid for the ranges of `rows`. A grouped format needs the number of channels."""
        grid = affine_grid(lo, hi, 2**self.bits, signed=self.signed)
        if self.group is None:
            return grid
        assert channels is not None, "a grouped format needs the number of channels"
        return self._two_level(grid, channels)

    def _two_level(self, grid: Grid, channels: int) -> Grid:
        """Scales of groups as an integer factor of one float scale per channel."""
        group_scales = grid.scale.reshape(channels, -1)
        scale = group_scales.amax(1, keepdim=True) / self.largest_factor
        factor = (group_scales / scale).round().clamp(1, self.largest_factor)
        zero = grid.zero.reshape(channels, -1)[:, :1].contiguous()
        return Grid(scale, zero, factor)

    def steps(self, grid: Grid, columns: int) -> Grid:
        """The same grid without factors: they are spread over the columns and in the scale."""
        if grid.factor is None:
            return grid
        return Grid(grid.scale * self._spread(grid.factor, columns), grid.zero)

    def _spread(self, factor: Tensor, columns: int) -> Tensor:
        """Factors of groups, rows x groups, repeated to rows x columns."""
        assert self.group is not None, "only a grouped format has factors"
        return factor.float().repeat_interleave(self.group, 1)[:, :columns]

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes as uint8: rows x columns with an axis, in the shape of x without one."""
        flat = x if self.axis is None else x.flatten(1)
        steps = self.steps(grid, flat.shape[-1])
        return affine_encode(flat.float(), steps, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Values in float32.

        The integer part is exact, so the same multiplications in any order agree bit for bit.
        """
        whole = codes.float() - grid.zero
        if grid.factor is not None:
            whole = whole * self._spread(grid.factor, codes.shape[-1])
        return whole * grid.scale
