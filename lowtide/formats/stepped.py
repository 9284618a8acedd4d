"""Stepped format: an affine grid of inputs whose number of bits differs between the steps."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats.affine import Grid, affine_grid


@dataclass(frozen=True)
class Stepped:
    """Codes of bits[t] bits at step t, with a scale and a zero point for each step.

    A quantizer knows the running step, so it rounds by itself: `tops` has the last code of each.
    """

    bits: tuple[int, ...]
    signed: bool = False
    axis: None = None
    group: None = None

    def tops(self, like: Tensor) -> Tensor:
        """The last code of each step, (steps,), on the device of `like`."""
        return torch.tensor([float(2**bits - 1) for bits in self.bits], device=like.device)

    def rows(self, x: Tensor) -> Tensor:
        return x.reshape(1, -1)

    def params(self, lo: Tensor, hi: Tensor, channels: int | None = None) -> Grid:
        """The grids for one range of each step, or for one range of all steps."""
        return affine_grid(lo, hi, self.tops(lo) + 1, signed=False)
