"""A quantizer: a format of inputs, and the calibrated range for each sampling step or for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Grid, InputFormat, OwnRange, Stepped
from lowtide.kernels import per_sample, quantize_input
from lowtide.nn.clock import Clock, at_step
from lowtide.nn.lsq import lsq_round


class SamplePart(NamedTuple):
    """The samples from `start` to `end` of a batch of `whole`."""

    start: int
    end: int
    whole: int


class QDrop:
    """QDrop (Wei et al., ICLR 2022): with this chance, a value stays as it was before the rounding.

    The other values are rounded. The gradient passes straight through the rounding.

    part: the samples that x holds of a batch. Chances are drawn for the whole batch, so that a
        sample's do not depend on which process has it.
    """

    def __init__(self, chance: float, generator: torch.Generator):
        self.chance = chance
        self.generator = generator
        self.part: SamplePart | None = None

    def rewind(self, state: Tensor, part: SamplePart) -> None:
        """Go back to this state of the generator, for these samples of a batch.

        They get the numbers that they would get in the whole batch.
        """
        self.generator.set_state(state)
        self.part = part

    def __call__(self, x: Tensor, rounded: Tensor) -> Tensor:
        dropped = self._drawn(x.shape) < self.chance
        return x + (rounded - x).detach().masked_fill(dropped.to(x.device), 0)

    def _drawn(self, shape: torch.Size) -> Tensor:
        """Numbers from 0 to 1. The first axis holds samples, or heads or windows of each sample."""
        part = self.part or SamplePart(0, 1, 1)
        own = part.end - part.start
        if not shape or shape[0] % own:  # no axis of samples
            return torch.rand(shape, generator=self.generator)
        each = shape[0] // own
        drawn = torch.rand((each * part.whole, *shape[1:]), generator=self.generator)
        return drawn[each * part.start : each * part.end]


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
    def has_range(self) -> bool:
        """Whether the clock's table has a row for it."""
        return self.format is not None and not isinstance(self.format, OwnRange)

    @property
    def scale(self) -> Tensor:
        """The scales: (steps,), or (1,) for one range for all steps."""
        return self.clock.scale[self.row, : None if self.per_step else 1]

    def _of_step(self, row: Tensor) -> Tensor:
        """The value of a row of the clock's table at the running step: shape () or (batch,)."""
        return at_step(row, self.clock.index.to(row.device)) if self.per_step else row[0]

    def step(self) -> tuple[Tensor, Tensor]:
        """Scale and zero of the running step: shape () or (batch,)."""
        clock = self.clock
        return self._of_step(clock.scale[self.row]), self._of_step(clock.zero[self.row])

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
        if isinstance(format, OwnRange):
            return format.round(x)
        scale, zero = self.step()
        if isinstance(format, Affine):
            return quantize_input(x, scale, zero, format.top)
        if isinstance(format, Stepped):
            top = per_sample(self._of_step(format.tops(scale)), x)
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
        scale = per_sample(self._of_step(log_scale).exp(), x)
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
