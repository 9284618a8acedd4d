"""Timed sampling: a batch of a model, with the time of each call and the sample after each step."""

import statistics
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps

import numpy as np
import torch
from torch import Tensor, nn

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.machine.devices import synchronize
from lowtide.report.evidence import TrajectoryErrors
from lowtide.sampling.pipelines import Pipeline, Scheduler


@dataclass(frozen=True)
class SampledBatch:
    """One batch of one model.

    images: (batch, height, width, channels). samples: the sample after each step, on the CPU.
    timesteps: one for each step. seconds: one for each call of the denoiser.
    """

    images: np.ndarray
    samples: list[Tensor]
    timesteps: list[int]
    seconds: list[float]


@dataclass
class ModelSamples:
    """All batches of one model, and its squared error to the reference after each step."""

    images: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)
    calls: int = 0
    squared_error: np.ndarray | float = 0.0
    squared_reference: np.ndarray | float = 0.0

    def add(self, batch: SampledBatch, reference: SampledBatch) -> None:
        check_same_sampling(batch, reference)
        self.images.append(batch.images)
        self.latents.append(batch.samples[-1].numpy())
        self.seconds += batch.seconds
        self.timesteps = batch.timesteps
        self.calls = len(batch.seconds)
        pairs = zip(batch.samples, reference.samples, strict=True)
        self.squared_error = self.squared_error + _squares(x - y for x, y in pairs)
        self.squared_reference = self.squared_reference + _squares(reference.samples)

    def join(self, later: "ModelSamples") -> None:
        """Add later batches of the same model."""
        self.images += later.images
        self.latents += later.latents
        self.seconds += later.seconds
        self.timesteps = later.timesteps
        self.calls = later.calls
        self.squared_error = self.squared_error + later.squared_error
        self.squared_reference = self.squared_reference + later.squared_reference

    @property
    def seconds_per_step(self) -> float:
        """The median time of a call, times the calls of a step."""
        return statistics.median(self.seconds) * self.calls / len(self.timesteps)

    def trajectory(self) -> TrajectoryErrors:
        error = np.sqrt(self.squared_error / self.squared_reference)
        return TrajectoryErrors(self.timesteps, error.tolist())


def _squares(samples: Iterable[Tensor]) -> np.ndarray:
    """The sum of squares of each tensor."""
    return np.array([float(x.double().square().sum()) for x in samples])


def check_same_sampling(batch: SampledBatch, reference: SampledBatch) -> None:
    if batch.images.shape != reference.images.shape:
        sizes = [" x ".join(map(str, each.images.shape[1:3])) for each in (batch, reference)]
        wrong = f"found images of {' and of '.join(sizes)}"
        raise BadInput(wrong, "one size", "compare models of the same image size")
    if batch.timesteps != reference.timesteps:
        spans = [f"{each.timesteps[0]} to {each.timesteps[-1]}" for each in (batch, reference)]
        wrong = f"found schedules with timesteps {' and '.join(spans)}"
        raise BadInput(wrong, "the same timesteps", "give both pipelines one scheduler")


def sample_batch(pipe: Pipeline, request: sampling.Request) -> SampledBatch:
    """One batch, with the time of each denoiser call and the result of each scheduler step."""
    seconds: list[float] = []
    steps: list[tuple[int, Tensor]] = []
    with _timed_calls(sampling.denoiser(pipe), seconds), _recorded_steps(pipe.scheduler, steps):
        images = sampling.run_pipeline(pipe, request)
    if images.ndim != 4:
        raise BadInput(
            f"found a {type(pipe).__name__}, which draws no images "
            f"({' x '.join(map(str, images.shape[1:]))})",
            "images, which metrics compare",
            "draw with lowtide.images and compare the frames",
        )
    # DiT steps both halves of a guided batch and keeps the first.
    samples = [x[: len(request.seeds)] for _, x in steps]
    return SampledBatch(images, samples, [timestep for timestep, _ in steps], seconds)


@contextmanager
def _timed_calls(model: nn.Module, seconds: list[float]) -> Iterator[None]:
    """Append the time of each call of the model, its own hooks included."""
    started: list[float] = []
    before = model.register_forward_pre_hook(
        lambda module, args: started.append(_synchronized_time(module)), prepend=True
    )
    after = model.register_forward_hook(
        lambda module, args, output: seconds.append(_synchronized_time(module) - started.pop())
    )
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _synchronized_time(model: nn.Module) -> float:
    """The time in seconds, after all work on the model's device."""
    synchronize(next(model.parameters()).device)
    return time.perf_counter()


@contextmanager
def _recorded_steps(scheduler: Scheduler, steps: list[tuple[int, Tensor]]) -> Iterator[None]:
    """Append the timestep and the sample of each scheduler step."""
    step = scheduler.step

    @wraps(step)
    def recorded(
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *args: object,
        **options: object,
    ) -> object:
        output = step(model_output, timestep, sample, *args, **options)
        x = output[0] if isinstance(output, tuple) else output.prev_sample
        steps.append((round(float(timestep)), x.detach().to("cpu", torch.float32, copy=True)))
        return output

    scheduler.step = recorded
    try:
        yield
    finally:
        # Code that replaced the attribute during sampling may have deleted it already.
        vars(scheduler).pop("step", None)
