"""The clock: the running sampling step, found from the timestep, and the input ranges of each step.

The key is the value of the timestep that the denoiser is called with, never a loop counter: some
solvers evaluate a step twice, users change the number of steps, and calibration batches mix
timesteps. A packed denoiser adds a step for a timestep that it was not calibrated for, if it has
what that needs (nn/extension.py). Elsewhere such a timestep is an error that names the calibrated
ones. All input ranges are in one table, a row for each quantizer and a column for each step, so
that a checkpoint holds two tensors for all of them.

Nothing waits for a device at each step. A scheduler's timesteps are views of one tensor, which is
copied to the CPU once. While a CUDA graph is captured or torch.compile traces, nothing can be
copied and no error raised: the device looks the step up, and an unknown timestep makes the sample,
and so the whole answer, NaN.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput

CLOCK = "lowtide_clock"
SAME = 0.01  # ticks: how far apart two readings of one timestep can be
HALF = 0.5  # ticks
LONGEST = 4096  # timesteps of a schedule


class Extends(Protocol):
    """Adds steps to a denoiser for timesteps that it was not calibrated for."""

    def add(self, root: nn.Module, values: list[float], *, whole: bool) -> None: ...


class Clock(nn.Module):
    """The timesteps, the table of ranges, and the index of the running step.

    Timesteps are integers; `ticks` of them make one unit of the denoiser's own timestep. Steps that
    were added at run time follow the calibrated ones.
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
        times: tuple[float, ...] = (),
    ):
        """`keyed`: something depends on the timestep. `times`: the unrounded calibrated timesteps.

        By default, it is keyed exactly when there is a range for each step.
        """
        super().__init__()
        self.keyed = per_step if keyed is None else keyed
        self.per_step = per_step
        columns = len(timesteps) if per_step else 1
        self.register_buffer("timesteps", torch.tensor(timesteps, dtype=torch.int32))
        self.register_buffer("scale", torch.ones(rows, columns, dtype=torch.float32))
        self.register_buffer("zero", torch.zeros(rows, columns, dtype=torch.uint8))
        self.ticks = ticks
        self._take_timesteps(timesteps, times)
        # How steps are added; None where an unknown timestep is an error.
        self.extension: Extends | None = None
        # Whether features belong to one timestep exactly, and not to all that round to its key.
        self.exact = False
        # Shape () while all samples share a step, (batch,) when calibration mixes them.
        self.index: Tensor = torch.zeros((), dtype=torch.long)
        # What the sample of a recorded call gets added: 0, or NaN for an unknown timestep.
        self.doubt: Tensor | None = None
        self.places: Tensor | None = None
        self.seen: SeenTimesteps | None = None

    def _take_timesteps(self, timesteps: tuple[int, ...], times: tuple[float, ...]) -> None:
        """Use these calibrated timesteps from here on, and forget those that were added."""
        self.known = {timestep: index for index, timestep in enumerate(timesteps)}
        self.times = list(times or (timestep / self.ticks for timestep in timesteps))
        self.added: dict[float, int] = {}

    @property
    def steps(self) -> int:
        """The number of steps, with those that were added."""
        return len(self.known) + len(self.added)

    def widen(self) -> None:
        """Give each step its own column, a copy of the first column."""
        if not len(self.scale):
            return
        self.scale = self.scale[:, :1].repeat(1, len(self.known))
        self.zero = self.zero[:, :1].repeat(1, len(self.known))
        self.keyed = True
        self.per_step = True

    def set(self, timestep: Tensor | float | int) -> None:
        """Set the running step from the timestep of a call, or from one timestep per sample.

        An unknown timestep is an error. In a call that is recorded, it sets `doubt` to NaN.
        """
        if unknown := self.find(timestep):
            raise _unknown_timestep(round(unknown[0] * self.ticks), list(self.known))

    def find(self, timestep: Tensor | float | int) -> list[float]:
        """As `set`; where timesteps are unknown, the step stays, and they are the answer."""
        self.doubt = None
        if not self.keyed:
            return []
        values = torch.as_tensor(timestep)
        exact = values.dtype not in (torch.bfloat16, torch.float16)
        tolerance = HALF if exact else HALF + 1000 * 2.0**-8
        if _is_recorded(values):
            self._set_on_device(values, tolerance)
            return []
        flat = self._on_cpu(values).detach().flatten().double().tolist()
        found = {value: self.lookup(value, tolerance) for value in dict.fromkeys(flat)}
        if unknown := [value for value, index in found.items() if index is None]:
            return unknown
        if len(set(found.values())) == 1:
            self.index = self._places()[found[flat[0]]]
        else:
            indices = [found[value] for value in flat]
            self.index = torch.tensor(indices, device=self.timesteps.device)
        return []

    def _places(self) -> Tensor:
        """All indices, on the device: the index of a step is a view of this, and needs no copy."""
        device = self.timesteps.device
        if self.places is None or self.places.device != device or len(self.places) != self.steps:
            self.places = torch.arange(self.steps, device=device)
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

    def lookup(self, value: float, tolerance: float = HALF) -> int | None:
        """The step of the timestep that differs from the value by rounding only.

        The tolerance is half a unit, and more for a timestep that is a half-precision float.
        """
        if value in self.added:
            return self.added[value]
        tick = value * self.ticks
        nearest = min(self.known, key=lambda known: abs(known - tick))
        timestep = round(tick) if round(tick) in self.known else nearest
        is_exact = self.exact and tolerance == HALF
        if abs(timestep - tick) > tolerance:
            return None if is_exact else self._lookup_added(tick, tolerance)
        index = self.known[timestep]
        return None if is_exact and not self._shares(index, tick) else index

    def _lookup_added(self, tick: float, tolerance: float) -> int | None:
        """The nearest step that was added, if it is near enough."""
        if not self.added:
            return None
        nearest = min(self.added, key=lambda value: abs(value * self.ticks - tick))
        return self.added[nearest] if abs(nearest * self.ticks - tick) <= tolerance else None

    def _shares(self, index: int, tick: float) -> bool:
        """Whether a calibrated step stands for this timestep, which rounds to its key.

        In a schedule of fractions the first timestep of a key stands for all of them. A step that
        was calibrated at an integer stands for that integer alone.
        """
        calibrated = self.times[index] * self.ticks
        is_fraction = abs(calibrated - round(calibrated)) > SAME
        return is_fraction or abs(calibrated - tick) <= SAME

    def add(self, values: list[float]) -> None:
        """Add a step for each of these timesteps; the tables of ranges have their columns."""
        ticks = [round(value * self.ticks) for value in values]
        more = torch.tensor(ticks, dtype=torch.int32, device=self.timesteps.device)
        self.timesteps = torch.cat([self.timesteps, more])
        self.added |= {value: self.steps + place for place, value in enumerate(values)}

    def forget_added(self) -> None:
        """Forget the steps that were added; the tables of ranges have lost their columns."""
        self.added = {}
        self.index = torch.zeros((), dtype=torch.long)

    def reschedule(self, timesteps: tuple[int, ...], times: tuple[float, ...]) -> None:
        """Replace the timesteps; the tables of ranges have their columns."""
        device = self.timesteps.device
        self.timesteps = torch.tensor(timesteps, dtype=torch.int32, device=device)
        self._take_timesteps(timesteps, times)
        self.index = torch.zeros((), dtype=torch.long)
        self.places = None

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
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[self.position]
        unknown = clock.find(timestep)
        if unknown and clock.extension is not None:
            schedule = schedule_of(timestep, unknown)
            clock.extension.add(module, schedule or unknown, whole=bool(schedule))
        if unknown:
            clock.set(timestep)
        if clock.doubt is None:
            return None
        if args:
            return (_doubted(args[0], clock.doubt), *args[1:]), kwargs
        return args, kwargs | {self.sample: _doubted(kwargs[self.sample], clock.doubt)}


def schedule_of(timestep: Any, unknown: list[float]) -> list[float]:
    """The schedule that a timestep is a view of, each value once; empty if there is none."""
    base = timestep._base if isinstance(timestep, Tensor) else None
    if base is None or base.dim() != 1 or len(base) > LONGEST:
        return []
    values = list(dict.fromkeys(base.detach().double().cpu().tolist()))
    return values if set(unknown) <= set(values) else []


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


def step_of_rows(index: Tensor, rows: int) -> Tensor:
    """The step of each row: the frames of a video are several rows of one sample."""
    return index.repeat_interleave(rows // len(index)) if index.dim() else index


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
        "without --only-schedule",
    )
