"""The clock: which sampling step is running, told by the timestep the denoiser was called with, and each input's range there.

Keyed by the timestep's value, never by a loop counter: solvers evaluate twice, users change step counts, and calibration
batches mix timesteps. A timestep without a calibrated range is an error that names those that have one. All input ranges
lie in one table, a row for each quantizer and a column for each step, so that a checkpoint holds two tensors of them.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput


class Clock(nn.Module):
    """Calibrated timesteps (as integers, `ticks` to a unit), the table of ranges, and the index of the running step."""

    def __init__(
        self,
        timesteps: tuple[int, ...],
        ticks: int = 1,
        rows: int = 0,
        per_step: bool = False,
        keyed: bool | None = None,
    ):
        """`keyed`: something depends on the timestep, so that an unknown one is an error (so it is if ranges do)."""
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
        """A column for each step, all of them as the first is."""
        if not len(self.scale):
            return
        self.scale, self.zero = (
            table[:, :1].repeat(1, len(self.known)) for table in (self.scale, self.zero)
        )
        self.keyed = True

    def set(self, timestep: Tensor | float | int) -> None:
        """Turn to the timestep of the running call, or to one timestep per sample."""
        if not self.keyed:
            return
        values = torch.as_tensor(timestep)
        exact = values.dtype not in (torch.bfloat16, torch.float16)
        slack = 0.5 if exact else 0.5 + 1000 * 2.0**-8
        found = [
            self.lookup(value * self.ticks, slack)
            for value in values.detach().flatten().double().tolist()
        ]
        index = torch.tensor(found, device=self.timesteps.device)
        self.index = index[0] if len(set(found)) == 1 else index

    def lookup(self, value: float, slack: float) -> int:
        """The calibrated timestep within rounding of the value: half a unit, or what a half-precision float blurs."""
        key = round(value)
        if key in self.known:
            return self.known[key]
        nearest = min(self.known, key=lambda known: abs(known - value))
        if abs(nearest - value) > slack:
            raise unknown_timestep(key, list(self.known))
        return self.known[nearest]

    def reschedule(self, timesteps: tuple[int, ...], nearest: Tensor, per_step: bool) -> None:
        """Know other timesteps: each takes the ranges of the old step that `nearest` names."""
        device = self.timesteps.device
        self.timesteps = torch.tensor(timesteps, dtype=torch.int32, device=device)
        self.known = {timestep: index for index, timestep in enumerate(timesteps)}
        self.index = torch.zeros((), dtype=torch.long)
        if per_step:
            self.scale, self.zero = (
                self.scale[:, nearest.to(device)],
                self.zero[:, nearest.to(device)],
            )

    def attach(self, root: nn.Module) -> None:
        """Listen at the denoiser's own calls."""
        position = list(inspect.signature(root.forward).parameters).index("timestep")

        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            module.get_submodule(CLOCK).set(
                kwargs["timestep"] if "timestep" in kwargs else args[position]
            )

        root.register_forward_pre_hook(listen, with_kwargs=True)


CLOCK = "lowtide_clock"


def unknown_timestep(found: int, known: list[int]) -> BadInput:
    shown = ", ".join(map(str, known[:6])) + (f", ... {known[-1]}" if len(known) > 6 else "")
    return BadInput(
        f"found timestep {found}",
        f"one of the {len(known)} it was calibrated for ({shown})",
        f"sample with {len(known)} steps and the scheduler used for quantizing, or see `lowtide reschedule` for others",
    )
