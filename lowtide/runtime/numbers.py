"""The scales and zero points of the running step, at fixed addresses."""

import torch
from torch import Tensor

from lowtide.formats import Adaptive, Affine
from lowtide.kernels.divisors import Divisors
from lowtide.nn.quantizer import Quantizer
from lowtide.runtime.steps import Rounding


class Numbers:
    """Scale and zero point of all quantizers at all steps.

    `table`: (steps, 2 * quantizers), scales before zero points. A run copies the row of its step
    to `now`, where the kernels read it, and the number of the step to `step`.
    """

    def __init__(self, quantizers: list[Quantizer], steps: int):
        steps = max(steps, 1)  # a model without calibrated timesteps has one row
        self.count = len(quantizers)
        self.columns = {quantizer.row: index for index, quantizer in enumerate(quantizers)}
        scales = [quantizer.scale.detach().float().expand(steps) for quantizer in quantizers]
        zeros = [_zeros(quantizer).float().expand(steps) for quantizer in quantizers]
        self.table = torch.stack([*scales, *zeros], 1) if quantizers else torch.empty(steps, 0)
        self.now = self.table[0].clone()
        self.step = torch.zeros(1, dtype=torch.int64, device=self.table.device)

    def set_step(self, step: int) -> None:
        self.now.copy_(self.table[step])
        self.step[0] = step

    def rounding(
        self, quantizer: Quantizer, smooth: Divisors | None = None, room: int = 0
    ) -> Rounding:
        """The grid of this quantizer, for an input that is divided by `smooth` before."""
        format = quantizer.format
        assert isinstance(format, Affine | Adaptive)
        column = self.columns[quantizer.row]
        values = self.table[:, [column, self.count + column]].contiguous()
        divisors = None if smooth is None else smooth.values.cpu().numpy().tobytes()
        key = (values.cpu().numpy().tobytes(), format.top, divisors, room)
        scale = self.now.data_ptr() + self.now.element_size() * column
        zero = scale + self.now.element_size() * self.count
        return Rounding(scale, zero, format.top, smooth, key, column, room)


def _zeros(quantizer: Quantizer) -> Tensor:
    return quantizer.clock.zero[quantizer.row, : None if quantizer.per_step else 1]
