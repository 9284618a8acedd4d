"""QALoRA: a low-rank change of a weight, and its scales, learnt through the rounding (He et al., EfficientDM, ICLR 2024).

What the layer uses while it learns is round(W + B A) on its grid, with the gradient passed straight through the rounding, so
merging is no approximation: the same rounding once more, and the codes are all that is left. A convolution's weight is seen
as rows of in x k x k columns: A spans the whole kernel, B is 1 x 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Grid, Mixed
from lowtide.nn.lsq import lsq_round


@dataclass(frozen=True)
class Lattice:
    """Where a weight's values may lie when learning starts: format, grid, and the last code of each row."""

    format: Affine | Mixed
    grid: Grid
    top: Tensor


class LoRA(nn.Module):
    """`down` is A, rank x columns; `up` is B, rows x rank and zero at first, so nothing moves; `log_scale` one for each row."""

    def __init__(self, weight: Tensor, lattice: Lattice, rank: int, generator: torch.Generator):
        """`weight` as rows x columns. The factors' rank is at most that of the weight."""
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5
        self.weight, self.lattice = weight, lattice
        self.down = nn.Parameter(start.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.log_scale = nn.Parameter(lattice.grid.scale.log())

    def step(self) -> float:
        """The mean distance of two neighbours on the grid, where learning starts."""
        return (
            self.lattice.format.steps(self.lattice.grid, self.weight.shape[1]).scale.mean().item()
        )

    def moved(self) -> Tensor:
        """W + B A."""
        return torch.addmm(self.weight, self.up, self.down)

    def grid(self) -> Grid:
        """The grid with its learnt scales; zeros and factors stay where they were found."""
        return self.lattice.grid._replace(scale=self.log_scale.exp())

    def values(self) -> Tensor:
        """The rounded weight, which is what merged() gives, bit for bit unless groups multiply in between."""
        steps = self.lattice.format.steps(self.grid(), self.weight.shape[1])
        return lsq_round(self.moved(), steps.scale, steps.zero, self.lattice.top)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Grid]:
        """Codes and grid; the factors are not needed any more."""
        grid = self.grid()
        return self.lattice.format.encode(self.moved(), grid), grid
