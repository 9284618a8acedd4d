"""Adaptive format: uniform or log2, chosen for every step, for softmax outputs in [0, scale]."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Affine, Grid
from lowtide.formats.log2 import Log2

LOG2 = 1  # the zero point of a log2 step; a uniform step has 0


@dataclass(frozen=True)
class Adaptive:
    """The zero point of a step says which of the two formats the step uses.

    Where it is 0, the step is uniform from zero: code c stands for scale * c. Where it is 1, the
    step is log2: code c stands for scale * 2^-c, and the last code stands for zero.
    """

    bits: int
    signed: bool = False
    axis: None = None
    group: None = None

    @property
    def top(self) -> int:
        """The last code."""
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
        """The uniform grid of every step; `choose` makes some of the steps log2."""
        hi = hi.float()
        scale = torch.where(hi > 0, hi / self.top, 1.0)
        return Grid(scale, torch.zeros_like(hi))

    def choose(self, uniform: Grid, peak: Tensor, log2: Tensor) -> Grid:
        """The uniform grid, except where `log2` is true: there, the log2 grid below `peak`."""
        return Grid(torch.where(log2, peak, uniform.scale), log2.to(uniform.zero.dtype))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        uniform = self.uniform.encode(x, _from_zero(grid))
        return torch.where(grid.zero == LOG2, self.log2.encode(x, grid), uniform)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        uniform = self.uniform.decode(codes, _from_zero(grid))
        return torch.where(grid.zero == LOG2, self.log2.decode(codes, grid), uniform)


def _from_zero(grid: Grid) -> Grid:
    """The grid of a uniform step: its zero point only names the format, and codes start at 0."""
    return Grid(grid.scale, torch.zeros_like(grid.scale))
