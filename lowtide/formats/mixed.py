"""Mixed formats: one bit-width per output channel of the same weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid, affine_encode, affine_grid


@dataclass(frozen=True)
class Mixed:
    """Per-channel affine codes, channel i on bits[i] bits.

    Channels of 1 and 8 bits are symmetric, whatever `signed` says of the rest: two levels that bend would be zero and one
    more, and 8-bit codes have to fit an int8. A two-level channel's zero lies half-way, which no table of integers can hold.
    """

    bits: tuple[int, ...]
    signed: bool = True
    axis: int = 0
    group: None = None

    def levels(self, like: Tensor) -> Tensor:
        return torch.tensor(
            [2**bits for bits in self.bits], device=like.device, dtype=torch.float32
        )[:, None]

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        symmetric = affine_grid(lo, hi, self.levels(lo), True)
        if self.signed:
            return symmetric
        bent, levels = affine_grid(lo, hi, self.levels(lo), False), self.levels(lo)
        chosen = (levels == 2) | (levels == 256)
        return Grid(
            *(
                torch.where(chosen, one, other)
                for one, other in zip(symmetric[:2], bent[:2], strict=True)
            )
        )

    def steps(self, grid: Grid, columns: int) -> Grid:
        """The same grid, with the zeros of two-level channels half-way wherever they came from."""
        return grid._replace(zero=torch.where(self.levels(grid.scale) == 2, 0.5, grid.zero))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        return affine_encode(
            x.flatten(1).float(), self.steps(grid, x[0].numel()), self.levels(x) - 1
        ).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        return (codes.float() - self.steps(grid, codes.shape[1]).zero) * grid.scale
