"""Mixed formats: one bit-width per output channel of the same weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid, affine_encode, affine_grid


@dataclass(frozen=True)
class Mixed:
    """Per-channel affine codes, channel i on bits[i] bits.

    Channels of 1 and 8 bits are symmetric, whatever `signed` says of the others. An asymmetric
    channel of 1 bit would hold only zero and one other value, and 8-bit codes have to fit an int8.
    The zero point of a 1-bit channel is 0.5, which a table of integers cannot hold.
    """

    bits: tuple[int, ...]
    signed: bool = True
    axis: int = 0
    group: None = None

    def levels(self, like: Tensor) -> Tensor:
        """The number of codes of each channel, channels x 1, on the device of `like`."""
        counts = [2**bits for bits in self.bits]
        return torch.tensor(counts, device=like.device, dtype=torch.float32)[:, None]

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        levels = self.levels(lo)
        symmetric = affine_grid(lo, hi, levels, signed=True)
        if self.signed:
            return symmetric
        asymmetric = affine_grid(lo, hi, levels, signed=False)
        fixed = (levels == 2) | (levels == 256)
        scale = torch.where(fixed, symmetric.scale, asymmetric.scale)
        zero = torch.where(fixed, symmetric.zero, asymmetric.zero)
        return Grid(scale, zero)

    def steps(self, grid: Grid, columns: int) -> Grid:
        """The same grid, with the zero point of 1-bit channels at 0.5 whatever was stored."""
        return grid._replace(zero=torch.where(self.levels(grid.scale) == 2, 0.5, grid.zero))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        steps = self.steps(grid, x[0].numel())
        return affine_encode(x.flatten(1).float(), steps, self.levels(x) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        return (codes.float() - self.steps(grid, codes.shape[1]).zero) * grid.scale
