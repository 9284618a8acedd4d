"""QALoRA: a low-rank change of a weight, and its scales, learned through the rounding.

The method is that of EfficientDM (He et al., ICLR 2024). While it learns, the layer uses
round(W + B A) on its grid, and the gradient passes straight through the rounding. So the merge is
exact: the same rounding once more, after which only the codes and their grid are kept. The weight
of a convolution is rows of in x k x k columns: A covers the whole kernel, B is 1 x 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowtide.formats import Grid, WeightFormat
from lowtide.nn.lsq import lsq_round


@dataclass(frozen=True)
class WeightGrid:
    """The possible values of a weight at the start: format, grid, and the last code of each row."""

    format: WeightFormat
    grid: Grid
    top: Tensor


class LoRA(nn.Module):
    """The factors A and B of the change, and the logarithm of the scale of each row.

    `down` is A, rank x columns. `up` is B, rows x rank, and zero at first, so that nothing changes
    at the start. `log_scale` is rows x 1.
    """

    def __init__(
        self, weight: Tensor, weight_grid: WeightGrid, rank: int, generator: torch.Generator
    ):
        """`weight` is rows x columns. The rank is at most the rank of the weight."""
        super().__init__()
        rows, columns = weight.shape
        rank = min(rank, rows, columns)
        start = (2 * torch.rand(rank, columns, generator=generator) - 1) / columns**0.5
        self.weight = weight
        self.weight_grid = weight_grid
        self.down = nn.Parameter(start.to(weight))
        self.up = nn.Parameter(weight.new_zeros(rows, rank))
        self.log_scale = nn.Parameter(weight_grid.grid.scale.log())

    def _steps(self, grid: Grid) -> Grid:
        return self.weight_grid.format.steps(grid, self.weight.shape[1])

    def step(self) -> float:
        """The mean distance of two neighbours on the grid at the start."""
        return self._steps(self.weight_grid.grid).scale.mean().item()

    def moved(self) -> Tensor:
        """W + B A."""
        return torch.addmm(self.weight, self.up, self.down)

    def grid(self) -> Grid:
        """The grid with its learned scales; zero points and factors stay the same."""
        return self.weight_grid.grid._replace(scale=self.log_scale.exp())

    def values(self) -> Tensor:
        """The rounded weight.

        It equals the decoded result of merged(): bit for bit without groups, and up to the order
        of multiplications with them.
        """
        steps = self._steps(self.grid())
        return lsq_round(self.moved(), steps.scale, steps.zero, self.weight_grid.top)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Grid]:
        """Codes and grid of the changed weight; A and B are not needed any more."""
        grid = self.grid()
        return self.weight_grid.format.encode(self.moved(), grid), grid
