"""Log2 format: powers of two below a scale, for values in [0, scale] with most of them near zero.

Such values are the outputs of softmax.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid


@dataclass(frozen=True)
class Log2:
    """Code c stands for scale * 2^-c; the last code stands for zero."""

    bits: int
    signed: bool = False
    axis: None = None
    group: None = None

    @property
    def top(self) -> int:
        """The last code."""
        return 2**self.bits - 1

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        hi = hi.float()
        scale = torch.where(hi > 0, hi, 1.0)
        return Grid(scale, torch.zeros_like(scale))

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        exponent = -torch.log2((x.float() / grid.scale).clamp(min=2.0**-126))
        return exponent.round().clamp(0, self.top).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        values = grid.scale * torch.exp2(-codes.float())
        return torch.where(codes == self.top, torch.zeros_like(values), values)
