"""The clock: the running sampling step, found from the timestep, and the input ranges of each step.

The key is the value of the timestep that the denoiser is called with, never a loop counter: some
solvers evaluate a step twice, users change the number of steps, and calibration batches mix
timesteps. A timestep without calibrated ranges is an error that names the calibrated timesteps.
All input ranges are in one table, a row for each quantizer and a column for each step, so that a
checkpoint holds two tensors for all of them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput

CLOCK = "lowtide_clock"


class Clock(nn.Module):
    """The calibrated timesteps, the table of ranges, and the index of the running step.

    Timesteps are integers; `ticks` of them make one unit of the denoiser's own timestep.
    """

    timesteps: Tensor  # (steps,)
    scale: Tensor  # rows x steps, or rows x 1 where all steps share a range
    zero: Tensor

    def __init__(
        self,
        timesteps: tuple[int, ...],
        ticks: int = 1,
        rows: int = 0,
        *,
        per_step: bool = False,
        keyed: bool | None = None,
    ):
        """`keyed`: something depends on the timestep, so an unknown timestep is an error.

        By default it is so exactly when there is a range for each step.
        """
        super().__init__()
        self.keyed = per_step if keyed is None else keyed
        columns = len(timesteps) if per_step else 1
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(rows, columns, dtype=torch.float32))
        self.register_buffer("zero", torch.zeros(rows, columns, dtype=torch.uint8))
        self.known = {timestep: index for index, timestep in enumerate(timesteps)}
        self.ticks = ticks
        # Shape () while all samples share a step, (batch,) when calibration mixes them.
        self.index: Tensor = torch.zeros((), dtype=torch.long)

    def widen(self) -> None:
        """Give each step its own column, a copy of the first column."""
        if not len(self.scale):
            return
        self.scale = self.scale[:, :1].repeat(1, len(self.known))
        self.zero = self.zero[:, :1].repeat(1, len(self.known))
        self.keyed = True

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the running step from the timestep of a call, or from one timestep per sample."""
        if not self.keyed:
            return
        values = torch.as_tensor(timestep)
        exact = values.dtype not in (torch.bfloat16, torch.float16)
        tolerance = 0.5 if exact else 0.5 + 1000 * 2.0**-8
        # Not every device has float64, so the CPU converts.
        flat = values.detach().flatten().cpu().double().tolist()
        indices = [self._lookup(value * self.ticks, tolerance) for value in flat]
        index = torch.tensor(indices, device=self.timesteps.device)
        self.index = index[0] if len(set(indices)) == 1 else index

    def _lookup(self, value: float, tolerance: float) -> int:
        """The step of the calibrated timestep that differs from the value by rounding only.

        The tolerance is half a unit, and more for a timestep that is a half-precision float.
        """
        timestep = round(value)
        if timestep in self.known:
            return self.known[timestep]
        nearest = min(self.known, key=lambda known: abs(known - value))
        if abs(nearest - value) > tolerance:
            raise _unknown_timestep(timestep, list(self.known))
        return self.known[nearest]

    def reschedule(self, timesteps: tuple[int, ...], nearest: Tensor, *, per_step: bool) -> None:
        """Replace the timesteps: each new one takes the ranges of the old step `nearest` names."""
        device = self.timesteps.device
        self.timesteps = torch.tensor(timesteps, dtype=torch.int32, device=device)
        self.known = {timestep: index for index, timestep in enumerate(timesteps)}
        self.index = torch.zeros((), dtype=torch.long)
        if per_step:
            columns = nearest.to(device)
            self.scale = self.scale[:, columns]
            self.zero = self.zero[:, columns]

    def attach(self, root: nn.Module) -> None:
        """Set the clock of the denoiser `root` before each of its calls."""
        position = list(inspect.signature(root.forward).parameters).index("timestep")

        def set_clock(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            timestep = kwargs["timestep"] if "timestep" in kwargs else args[position]
            find_clock(module).set(timestep)

        root.register_forward_pre_hook(set_clock, with_kwargs=True)


def find_clock(root: nn.Module) -> Clock:
    """The clock of a quantized denoiser."""
    clock = root.get_submodule(CLOCK)
    assert isinstance(clock, Clock)
    return clock


def _unknown_timestep(timestep: int, known: list[int]) -> BadInput:
    shown = ", ".join(map(str, known[:6])) + (f", ... {known[-1]}" if len(known) > 6 else "")
    return BadInput(
        f"found timestep {timestep}",
        f"one of the {len(known)} it was calibrated for ({shown})",
        f"sample with {len(known)} steps and the scheduler used for quantizing, or quantize again "
        "for another schedule; a model quantized with --keep-temporal can be made fit by "
        "`lowtide reschedule`",
    )
