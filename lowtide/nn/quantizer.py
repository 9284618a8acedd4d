"""A quantizer: a format of inputs, and the calibrated range for each sampling step or for all."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Grid, InputFormat, Stepped
from lowtide.kernels import per_sample, quantize_input
from lowtide.nn.clock import Clock
from lowtide.nn.lsq import lsq_round


class QDrop:
    """QDrop (Wei et al., ICLR 2022): with this chance, a value stays as it was before the rounding.

    The other values are rounded. The gradient passes straight through the rounding.
    """

    def __init__(self, chance: float, generator: torch.Generator):
        self.chance = chance
        self.generator = generator

    def __call__(self, x: Tensor, rounded: Tensor) -> Tensor:
        dropped = torch.rand(x.shape, generator=self.generator) < self.chance
        return x + (rounded - x).detach().masked_fill(dropped.to(x.device), 0)


class Quantizer(nn.Module):
    """Rounds its input. Its range is the row `row` of the clock's table.

    `format` None is the identity. `learnt` is the logarithm of the scale while it learns.
    """

    clock: Clock

    def __init__(
        self, format: InputFormat | None, clock: Clock, row: int = 0, *, per_step: bool = False
    ):
        super().__init__()
        self.format = format
        self.row = row
        self.per_step = per_step
        self.enabled = False
        self.learnt: nn.Parameter | None = None
        self.drop: QDrop | None = None
        # The clock belongs to the denoiser; a plain attribute keeps it out of this module's state.
        object.__setattr__(self, "clock", clock)

    @property
    def scale(self) -> Tensor:
        """The scales: (steps,), or (1,) for one range for all steps."""
        return self.clock.scale[self.row, : None if self.per_step else 1]

    def _index(self) -> Tensor | int:
        return self.clock.index.to(self.clock.scale.device) if self.per_step else 0

    def step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of the running step: shape () or (batch,)."""
        index = self._index()
        return self.clock.scale[self.row, index], self.clock.zero[self.row, index]

    def forward(self, x: Tensor) -> Tensor:
        if self.format is None or not self.enabled:
            return x
        if self.learnt is not None:
            return self._round_learning(x, self.learnt)
        rounded = self._round(x, self.format)
        if self.drop:
            return self.drop(x, rounded)
        if x.requires_grad and torch.is_grad_enabled():
            # The gradient passes through formats that cannot learn, such as log2, to the layers
            # before. The added term is zero, so the value is the rounded one to the last bit.
            return rounded + (x - x.detach())
        return rounded

    def _round(self, x: Tensor, format: InputFormat) -> Tensor:
        scale, zero = self.step()
        if isinstance(format, Affine):
            return quantize_input(x, scale, zero, format.top)
        if isinstance(format, Stepped):
            top = per_sample(format.tops(scale)[self._index()], x)
            return quantize_input(x, scale, zero, top)
        grid = Grid(per_sample(scale, x), per_sample(zero, x))
        return format.decode(format.encode(x, grid), grid).to(x.dtype)

    def start_learning(self) -> nn.Parameter:
        """Learn the logarithm of the scale from here on.

        A step of the optimizer changes the scale by a share of it, and the scale stays positive.
        """
        self.learnt = nn.Parameter(self.scale.log())
        return self.learnt

    def _round_learning(self, x: Tensor, log_scale: Tensor) -> Tensor:
        """The same rounding, with a gradient for x and for the scale."""
        scale = per_sample(log_scale[self._index()].exp(), x)
        zero = per_sample(self.step()[1], x).float()
        form = self._format()
        assert not isinstance(form, Stepped), (
            "an input whose bits differ by step has learnt already"
        )
        return lsq_round(x.float(), scale, zero, form.top).to(x.dtype)

    @torch.no_grad()
    def finish_learning(self) -> None:
        assert self.learnt is not None, "no learning was started"
        self.scale.copy_(self.learnt.exp())
        self.learnt = None

    def fit(self, lo: Tensor, hi: Tensor) -> None:
        """Set the range: one lo and hi for each step. A single range fills the whole row."""
        self.take(self._format().params(lo.reshape(-1), hi.reshape(-1)))

    def _format(self) -> InputFormat:
        assert self.format is not None, "the input stays in float"
        return self.format

    @torch.no_grad()
    def take(self, grid: Grid) -> None:
        """Set the grid: one scale and zero for each step."""
        self.clock.scale[self.row] = grid.scale
        self.clock.zero[self.row] = grid.zero.to(torch.uint8)


@contextmanager
def dropping(module: nn.Module, drop: QDrop | None) -> Iterator[None]:
    """All quantizers of the module apply `drop` within the context."""
    quantizers = [each for each in module.modules() if isinstance(each, Quantizer)]
    for quantizer in quantizers:
        quantizer.drop = drop
    try:
        yield
    finally:
        for quantizer in quantizers:
            quantizer.drop = None


def input_format(bits: int) -> Affine | None:
    """The format of inputs of this many bits: None, which is float, for 16 and 32 bits.

    Inputs are asymmetric (SiLU, softmax), so their format is unsigned and its zero point is free.
    """
    return Affine(bits) if bits <= 8 else None
