"""Own range: an affine grid of inputs, found from the values as they come."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid, affine_grid


@dataclass(frozen=True)
class OwnRange:
    """Codes of `bits` bits. Values that share the last `axes` axes share a range.

    A linear layer has a range for each token, `axes` 1. A convolution has one for each sample,
    `axes` 3, because the taps of its window need one scale. No calibration is needed.
    """

    bits: int
    axes: int = 1
    signed: bool = False
    axis: None = None
    group: None = None

    @property
    def top(self) -> int:
        """The last code."""
        return 2**self.bits - 1

    def rows(self, x: Tensor) -> Tensor:
        """The values as rows that each have their own range."""
        return x.reshape(-1, x.shape[-self.axes :].numel())

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        return affine_grid(lo, hi, self.top + 1, signed=False)

    def grid(self, x: Tensor) -> Grid:
        """The grid of these values, in a shape that broadcasts against them."""
        shared = tuple(range(-min(self.axes, x.dim()), 0))
        return self.params(x.amin(shared, keepdim=True), x.amax(shared, keepdim=True))

    def codes(self, x: Tensor, grid: Grid) -> Tensor:
        """The codes of float32 values, still as float."""
        return (x / grid.scale).round_().add_(grid.zero).clamp_(0, self.top)

    def round(self, x: Tensor) -> Tensor:
        """The values rounded to their own grid, in the type that they had."""
        if not x.numel():
            return x
        values = x.to(torch.float32)
        grid = self.grid(values)
        return self.codes(values, grid).sub_(grid.zero).mul_(grid.scale).to(x.dtype)
