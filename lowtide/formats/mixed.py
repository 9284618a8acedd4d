"""Mixed formats: one bit-width per output channel of the same weight."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid, affine_encode, affine_grid


@dataclass(frozen=True)
class Mixed:
    """Per-channel affine codes, channel i on bits[i] bits (two-level channels are symmetric)."""

    bits: tuple[int, ...]
    signed: bool = True
    axis: int = 0
    group: None = None

    def levels(self, like: Tensor) -> Tensor:
        return torch.tensor([2**bits for bits in self.bits], device=like.device, dtype=torch.float32)[:, None]

    def rows(self, x: Tensor) -> Tensor:
        return x.flatten(1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        return affine_grid(lo, hi, self.levels(lo), self.signed)

    def steps(self, grid: Grid, columns: int) -> Grid:
        return grid

    def encode(self, x: Tensor, grid: Grid) -> Tensor:
        return affine_encode(x.flatten(1).float(), grid, self.levels(x) - 1).to(torch.uint8)

    def decode(self, codes: Tensor, grid: Grid) -> Tensor:
        return (codes.float() - grid.zero) * grid.scale
