"""Either format: uniform or log2, chosen anew at every step; the grid's zero says which. For softmax outputs, in [0, scale]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Affine, Grid
from lowtide.formats.log2 import Log2

UNIFORM, LOG2 = 0, 1


@dataclass(frozen=True)
class Adaptive:
    """Where zero is 0, code c stands for scale * c (uniform from zero); where it is 1, for scale * 2^-c, the last code for 0."""

    bits: int
    signed: bool = False
    axis: None = None
    group: None = None

    @property
    def top(self) -> int:
        return 2**self.bits - 1

    @property
    def uniform(self) -> Affine:
        return Affine(self.bits)

    @property
    def log2(self) -> Log2:
        return Log2(self.bits)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        """Uniform everywhere, until `choose` says otherwise."""
        hi = hi.float()
        return Grid(torch.where(hi > 0, hi / self.top, torch.ones_like(hi)), torch.zeros_like(hi))

    def choose(self, uniform: Grid, peak: Tensor, log2: Tensor) -> Grid:
        """This uniform grid, and log2 below the peak where asked."""
        return Grid(torch.where(log2, peak, uniform.scale), log2.to(uniform.zero.dtype))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        even = self.uniform.encode(x, Grid(grid.scale, torch.zeros_like(grid.scale)))
        return torch.where(grid.zero == LOG2, self.log2.encode(x, grid), even)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        even = self.uniform.decode(codes, Grid(grid.scale, torch.zeros_like(grid.scale)))
        return torch.where(grid.zero == LOG2, self.log2.decode(codes, grid), even)
