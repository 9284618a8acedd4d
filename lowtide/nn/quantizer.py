"""A quantizer: a format for inputs plus the range it has learnt, one per sampling step or one for all."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Format, Grid
from lowtide.kernels import per_sample, quantize_input
from lowtide.nn.clock import Clock
from lowtide.nn.lsq import lsq_round


class Drop:
    """QDrop (Wei et al., ICLR 2022): each value is the rounded one or, with this chance, the one it was; the gradient goes
    straight through to what is rounded."""

    def __init__(self, chance: float, generator: torch.Generator):
        self.chance, self.generator = chance, generator

    def __call__(self, x: Tensor, rounded: Tensor) -> Tensor:
        dropped = torch.rand(x.shape, generator=self.generator) < self.chance
        return x + (rounded - x).detach().masked_fill(dropped.to(x.device), 0)


class Quantizer(nn.Module):
    """Rounds what passes through. `format` None is the identity; its range is row `row` of the clock's table."""

    def __init__(self, format: Format | None, clock: Clock, row: int = 0, per_step: bool = False):
        super().__init__()
        self.format, self.row, self.per_step, self.enabled = format, row, per_step, False
        self.learnt: nn.Parameter | None = None
        self.drop: Drop | None = None
        # The clock belongs to the denoiser; a plain attribute keeps it out of this module's own state.
        object.__setattr__(self, "clock", clock)

    @property
    def scale(self) -> Tensor:
        """One scale per step, or a single one."""
        return self.clock.scale[self.row, : None if self.per_step else 1]

    def index(self) -> Tensor | int:
        return self.clock.index.to(self.clock.scale.device) if self.per_step else 0

    def step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of the running step: shape () or (batch,)."""
        index = self.index()
        return self.clock.scale[self.row, index], self.clock.zero[self.row, index]

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None or not self.enabled:
            return x
        if self.learnt is not None:
            return self.learning_forward(x)
        rounded = self.rounded(x)
        if self.drop:
            return self.drop(x, rounded)
        # What cannot learn, a log2 grid, still lets what comes before it learn; the value is the rounded one to the last bit.
        return (
            rounded + (x - x.detach()) if x.requires_grad and torch.is_grad_enabled() else rounded
        )

    def rounded(self, x: Tensor) -> Tensor:
        scale, zero = self.step()
        if isinstance(self.format, Affine):
            return quantize_input(x, scale, zero, self.format.top)
        grid = Grid(*(per_sample(part, x) for part in (scale, zero)))
        return self.format.decode(self.format.encode(x, grid), grid).to(x.dtype)

    def start_learning(self) -> nn.Parameter:
        """Learn the logarithm of the scale from here on: a step changes it by a share, and it stays positive."""
        self.learnt = nn.Parameter(self.scale.log())
        return self.learnt

    def learning_forward(self, x: Tensor) -> Tensor:
        """The same rounding, with the gradient passed straight through it."""
        scale, zero = self.learnt[self.index()].exp(), self.step()[1]
        return lsq_round(
            x.float(), per_sample(scale, x), per_sample(zero, x).float(), self.format.top
        ).to(x.dtype)

    @torch.no_grad()
    def finish_learning(self) -> None:
        self.scale.copy_(self.learnt.exp())
        self.learnt = None

    def fit(self, lo: Tensor, hi: Tensor) -> None:
        """Take the range: one lo and hi for each step. A single range fills the whole row."""
        self.take(self.format.params(lo.reshape(-1), hi.reshape(-1)))

    @torch.no_grad()
    def take(self, grid: Grid) -> None:
        """Take the grid: one scale and zero for each step."""
        self.clock.scale[self.row] = grid.scale
        self.clock.zero[self.row] = grid.zero.to(torch.uint8)


@contextmanager
def dropping(module: nn.Module, drop: Drop | None) -> Iterator[None]:
    """Every quantizer of the module drops, for a while."""
    found = [each for each in module.modules() if isinstance(each, Quantizer)]
    for each in found:
        each.drop = drop
    try:
        yield
    finally:
        for each in found:
            each.drop = None


def input_format(bits: int) -> Format | None:
    """Inputs are unsigned and lopsided (SiLU, softmax), so their zero is free; 16 and 32 bits leave them in float."""
    return Affine(bits) if bits <= 8 else None
