"""Affine formats: value = (code - zero) * scale, per tensor, per output channel, or per group of a channel.

Codes are always unsigned, 0 .. 2^bits - 1. A signed format fixes zero at the middle and is symmetric; an unsigned one
learns zero and so bends to lopsided ranges. Whatever the choice, (code - zero) times a group's factor fits an int8 for
weights of up to 8 bits (8-bit weights are signed), so an int8 kernel with one float scale per channel can run them all.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """Where the representable values lie. Shapes broadcast against rows x columns; factor is rows x groups."""

    scale: Tensor
    zero: Tensor
    factor: Tensor | None = None


def affine_grid(lo: Tensor, hi: Tensor, levels: int | Tensor, signed: bool) -> Grid:
    """The grid of `levels` values that covers [lo, hi] and holds zero exactly (one bit, signed: plus and minus a half)."""
    lo, hi = lo.float().clamp(max=0), hi.float().clamp(min=0)
    levels = torch.as_tensor(levels, device=lo.device, dtype=torch.float32)
    if signed:
        middle = levels // 2
        two_levels = 2 * torch.maximum(-lo, hi)
        scale = torch.where(
            levels > 2, torch.maximum(-lo / middle, hi / (middle - 1).clamp(min=1)), two_levels
        )
        zero = torch.where(levels > 2, middle, 0.5).expand_as(scale)
    else:
        scale = (hi - lo) / (levels - 1)
        zero = None
    # A dead channel has no range: any scale holds its zeros, and 1 divides safely.
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return Grid(scale, torch.minimum((-lo / scale).round(), levels - 1) if zero is None else zero)


def affine_encode(x: Tensor, grid: Grid, top: int | Tensor) -> Tensor:
    """The nearest code, still as float."""
    return (
        (x / grid.scale + grid.zero)
        .round_()
        .clamp_(min=0)
        .minimum(torch.as_tensor(top, device=x.device, dtype=x.dtype))
    )


@dataclass(frozen=True)
class Affine:
    """`bits` per code; `axis` 0 gives each output channel a scale; `group` gives each run of columns a factor 1..15."""

    bits: int
    signed: bool = False
    axis: int | None = None
    group: int | None = None

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def largest_factor(self) -> int:
        """How far a group may be stretched with (code - zero) * factor still an int8."""
        return max(1, min(15, 127 // 2 ** (self.bits - 1)))

    def rows(self, x: Tensor) -> Tensor:
        """The tensor as rows that each have a range of their own: 1, channels, or channels * groups of them."""
        flat = x.reshape(1, -1) if self.axis is None else x.flatten(1)
        if self.group is None:
            return flat
        short = -flat.shape[1] % self.group
        return torch.nn.functional.pad(flat, (0, short)).reshape(-1, self.group)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        """The grid for ranges found on `rows`; `channels` says how grouped rows fold back."""
        grid = affine_grid(lo, hi, 2**self.bits, self.signed)
        return grid if self.group is None else self.two_level(grid, channels)

    def two_level(self, grid: Grid, channels: int) -> Grid:
        """Per-group scales as an integer factor of one float scale per channel."""
        wanted = grid.scale.reshape(channels, -1)
        scale = wanted.amax(1, keepdim=True) / self.largest_factor
        factor = (wanted / scale).round().clamp(1, self.largest_factor)
        return Grid(scale, grid.zero.reshape(channels, -1)[:, :1].contiguous(), factor)

    def steps(self, grid: Grid, columns: int) -> Grid:
        """The grid with its factor spread over the columns, multiplied into the scale."""
        if grid.factor is None:
            return grid
        return Grid(grid.scale * self.spread(grid.factor, columns), grid.zero)

    def spread(self, factor: Tensor, columns: int) -> Tensor:
        return factor.float().repeat_interleave(self.group, 1)[:, :columns]

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        """Codes as uint8, in the shape of x flattened to rows x columns (per tensor: in the shape of x)."""
        flat = x if self.axis is None else x.flatten(1)
        return affine_encode(flat.float(), self.steps(grid, flat.shape[-1]), self.top).to(
            torch.uint8
        )

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        """Values in float32. The integer part is exact, so every order of the same multiplications agrees bit for bit."""
        whole = codes.float() - grid.zero
        if grid.factor is not None:
            whole = whole * self.spread(grid.factor, codes.shape[-1])
        return whole * grid.scale
