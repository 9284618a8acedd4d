"""Turns: every model draws the same seeds, batch by batch in turn, so that a busy machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.evaluation.compared_models import Subject
from lowtide.report.grids import pixels


@dataclass(frozen=True)
class Turn:
    """One batch of one model: its images, the sample after each step, the steps' timesteps, and seconds of each call."""

    images: np.ndarray
    path: list[Tensor]
    timesteps: list[int]
    seconds: list[float]


@dataclass
class Drawing:
    """What a model drew in all its turns, and how far from the reference's path it was."""

    images: list[np.ndarray] = field(default_factory=list)
    latents: list[np.ndarray] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    timesteps: list[int] = field(default_factory=list)
    calls: int = 0
    away: np.ndarray | float = 0.0
    whole: np.ndarray | float = 0.0

    def add(self, turn: Turn, original: Turn) -> None:
        check_same(turn, original)
        self.images.append(turn.images)
        self.latents.append(turn.path[-1].numpy())
        self.seconds += turn.seconds
        self.timesteps, self.calls = turn.timesteps, len(turn.seconds)
        self.away = self.away + energies(
            ours - theirs for ours, theirs in zip(turn.path, original.path, strict=True)
        )
        self.whole = self.whole + energies(original.path)

    @property
    def seconds_per_step(self) -> float:
        """The median call, times the calls that a step takes."""
        return statistics.median(self.seconds) * self.calls / len(self.timesteps)

    def trajectory(self) -> dict[str, list]:
        """Relative L2 of the sample to the reference's after each step."""
        return {"timesteps": self.timesteps, "error": np.sqrt(self.away / self.whole).tolist()}


def energies(samples: Any) -> np.ndarray:
    return np.array([float(each.double().square().sum()) for each in samples])


def check_same(turn: Turn, original: Turn) -> None:
    if turn.images.shape != original.images.shape:
        sizes = [" x ".join(map(str, each.images.shape[1:3])) for each in (turn, original)]
        raise BadInput(
            f"found images of {' and of '.join(sizes)}",
            "one size",
            "compare models of the same image size",
        )
    if turn.timesteps != original.timesteps:
        steps = [f"{each.timesteps[0]} to {each.timesteps[-1]}" for each in (turn, original)]
        raise BadInput(
            f"found schedules with timesteps {' and '.join(steps)}",
            "the same timesteps",
            "give both pipelines one scheduler",
        )


def draw_in_turns(
    subjects: Sequence[Subject],
    request: sampling.Request,
    folder: Path,
    track: Callable[..., Iterator],
) -> dict[str, Drawing]:
    """All images, also as FOLDER/<key>/<seed>.png; the first subject is the reference."""
    drawings, original = {subject.key: Drawing() for subject in subjects}, None
    turns = [(batch, subject) for batch in request.batches() for subject in subjects]
    for batch, subject in track(turns, len(turns), "drawing images"):
        turn = take(subject.pipe, batch)
        original = turn if subject is subjects[0] else original
        drawings[subject.key].add(turn, original)
        write_images(folder / subject.key, turn.images, batch.seeds)
    return drawings


def take(pipe: Any, request: sampling.Request) -> Turn:
    """Draw one batch, listening to the denoiser's clock and the scheduler's steps."""
    seconds: list[float] = []
    path: list[tuple[int, Tensor]] = []
    with timed(sampling.denoiser(pipe), seconds), heard_steps(pipe.scheduler, path):
        images = sampling.run_pipeline(pipe, request)
    # DiT steps both halves of a guided batch; the first is the one it keeps.
    samples = [x[: len(request.seeds)] for _, x in path]
    return Turn(images, samples, [timestep for timestep, _ in path], seconds)


@contextmanager
def timed(model: nn.Module, seconds: list[float]) -> Iterator[None]:
    """Write down how long each call of the model takes, what its own hooks do included."""
    started: list[float] = []
    before = model.register_forward_pre_hook(
        lambda module, args: started.append(now(module)), prepend=True
    )
    after = model.register_forward_hook(
        lambda module, args, answer: seconds.append(now(module) - started.pop())
    )
    try:
        yield
    finally:
        before.remove()
        after.remove()


def now(model: nn.Module) -> float:
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def heard_steps(scheduler: Any, path: list[tuple[int, Tensor]]) -> Iterator[None]:
    """Write down what each step of the scheduler gives."""
    step = scheduler.step

    @wraps(step)
    def heard(model_output: Tensor, timestep: Any, *args: Any, **options: Any) -> Any:
        answer = step(model_output, timestep, *args, **options)
        x = answer[0] if isinstance(answer, tuple) else answer.prev_sample
        path.append((round(float(timestep)), x.detach().to("cpu", torch.float32, copy=True)))
        return answer

    scheduler.step = heard
    try:
        yield
    finally:
        # Whoever listened inside may have taken the name away with its own.
        vars(scheduler).pop("step", None)


def write_images(folder: Path, images: np.ndarray, seeds: Sequence[int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for image, seed in zip(pixels(images), seeds, strict=True):
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(
            folder / f"{seed}.png"
        )
