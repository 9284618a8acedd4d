"""The clock: the running sampling step, found from the timestep, and the input ranges of each step.

The key is the value of the timestep that the denoiser is called with, never a loop counter: some
solvers evaluate a step twice, users change the number of steps, and calibration batches mix
timesteps. A timestep without calibrated ranges is an error that names the calibrated timesteps.
All input ranges are in one table, a row for each quantizer and a column for each step, so that a
checkpoint holds two tensors for all of them.

Nothing waits for a device at each step. A scheduler's timesteps are views of one tensor, which is
copied to the CPU once. While a CUDA graph is captured or torch.compile traces, nothing can be
copied and no error raised: the device looks the step up, and an unknown timestep makes the sample,
and so the whole answer, NaN.
"""

import inspect
from dataclasses import dataclass
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
        # What the sample of a recorded call gets added: 0, or NaN for an unknown timestep.
        self.doubt: Tensor | None = None
        self.places: Tensor | None = None
        self.seen: SeenTimesteps | None = None

    def widen(self) -> None:
        """Give each step its own column, a copy of the first column."""
        if not len(self.scale):
            return
        self.scale = self.scale[:, :1].repeat(1, len(self.known))
        self.zero = self.zero[:, :1].repeat(1, len(self.known))
        self.keyed = True

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the running step from the timestep of a call, or from one timestep per sample.

        An unknown timestep is an error. In a call that is recorded, it sets `doubt` to NaN.
        """
        self.doubt = None
        if not self.keyed:
            return
        values = torch.as_tensor(timestep)
        exact = values.dtype not in (torch.bfloat16, torch.float16)
        tolerance = 0.5 if exact else 0.5 + 1000 * 2.0**-8
        if _is_recorded(values):
            self._set_on_device(values, tolerance)
            return
        flat = self._on_cpu(values).detach().flatten().double().tolist()
        indices = [self._lookup(value * self.ticks, tolerance) for value in flat]
        if len(set(indices)) == 1:
            self.index = self._places()[indices[0]]
        else:
            self.index = torch.tensor(indices, device=self.timesteps.device)

    def _places(self) -> Tensor:
        """All indices, on the device: the index of a step is a view of this, and needs no copy."""
        if self.places is None or self.places.device != self.timesteps.device:
            self.places = torch.arange(len(self.known), device=self.timesteps.device)
        return self.places

    def _on_cpu(self, values: Tensor) -> Tensor:
        """The values on the CPU. Views of a schedule that was seen before wait for no device."""
        schedule = values._base
        if values.device.type == "cpu" or schedule is None or values.is_inference():
            return values.cpu()
        if self.seen is None or not self.seen.has(schedule):
            self.seen = SeenTimesteps.of(schedule)
        return self.seen.part(values)

    def _set_on_device(self, values: Tensor, tolerance: float) -> None:
        """The nearest calibrated step, looked up by the device."""
        asked = values.detach().to(self.timesteps.device).reshape(-1, 1).float() * self.ticks
        away = (self.timesteps - asked).abs()
        nearest, index = away.min(1)
        doubt = torch.zeros_like(nearest).masked_fill(~(nearest <= tolerance), float("nan"))
        alone = index.numel() == 1
        self.index = index[0] if alone else index
        self.doubt = doubt[0] if alone else doubt

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
        self.places = None
        if per_step:
            columns = nearest.to(device)
            self.scale = self.scale[:, columns]
            self.zero = self.zero[:, columns]

    def attach(self, root: nn.Module) -> None:
        """Set the clock of the denoiser `root` before each of its calls."""
        names = list(inspect.signature(root.forward).parameters)
        position = names.index("timestep")
        root.register_forward_pre_hook(SetClock(names[0], position), with_kwargs=True)


@dataclass(frozen=True)
class SetClock:
    """The hook of a denoiser. `sample`: the name of its first argument; `position`: the time's."""

    sample: str
    position: int

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        clock = find_clock(module)
        clock.set(kwargs["timestep"] if "timestep" in kwargs else args[self.position])
        if clock.doubt is None:
            return None
        if args:
            return (_doubted(args[0], clock.doubt), *args[1:]), kwargs
        return args, kwargs | {self.sample: _doubted(kwargs[self.sample], clock.doubt)}


def _doubted(sample: Tensor, doubt: Tensor) -> Tensor:
    """The sample, or NaN. Attention folds nothing here, so a doubt is one number or the batch's."""
    shape = (-1, *[1] * (sample.dim() - 1))
    return sample + doubt.to(sample.device, sample.dtype).reshape(shape)


@dataclass(frozen=True)
class SeenTimesteps:
    """A schedule on a device, and its values on the CPU as they were at this version."""

    schedule: Tensor
    version: int
    values: Tensor

    @classmethod
    def of(cls, schedule: Tensor) -> "SeenTimesteps":
        copied = torch.empty_strided(schedule.shape, schedule.stride(), dtype=schedule.dtype)
        return cls(schedule, schedule._version, copied.copy_(schedule))

    def has(self, schedule: Tensor) -> bool:
        return self.schedule is schedule and schedule._version == self.version

    def part(self, view: Tensor) -> Tensor:
        """The values of a view of the schedule."""
        first = view.storage_offset() - self.schedule.storage_offset()
        return self.values.as_strided(view.shape, view.stride(), first)


def _is_recorded(values: Tensor) -> bool:
    """Whether torch.compile traces this call, or a CUDA graph that cannot wait captures it."""
    if torch.compiler.is_compiling():
        return True
    return values.is_cuda and torch.cuda.is_current_stream_capturing()


def at_step(table: Tensor, index: Tensor) -> Tensor:
    """The entries of a table (steps, ...) at these steps; `table[index]` waits for the device."""
    chosen = table.index_select(0, index.reshape(-1))
    return chosen.reshape((*index.shape, *table.shape[1:]))


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
