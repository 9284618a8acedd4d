"""The zoo's training loop: one for every model, resumable to the same weights."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lowtide.zoo.noise import Leg, device
from lowtide.zoo.specs import SPECS

EVERY = 250
SHOW = 10
SECONDS = 60


class Trainer:
    """The float training loop: weights, their moving average, and the step they stand at."""

    def __init__(self, name: str, data: Path, out: Path, compiled: bool = False):
        self.name, self.out, self.spec = name, out, SPECS[name]
        torch.manual_seed(self.spec.seed)
        self.task = self.spec.task(data)
        self.model = self.task.parts.train().to(device(), memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model)
        self.step, self.losses = 0, []
        on_gpu = device().type == "cuda"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.leg.rate, weight_decay=1e-4, fused=on_gpu)
        if on_gpu or compiled:
            compile_parts(self.model)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write beside, then rename: a kill while saving loses nothing."""
        self.out.mkdir(parents=True, exist_ok=True)
        fresh = self.checkpoint.with_suffix(".new")
        parts = {part: getattr(self, part).state_dict() for part in ("model", "average", "optimizer")}
        torch.save(parts | {"step": self.step, "losses": self.losses}, fresh)
        fresh.replace(self.checkpoint)

    def resume(self) -> None:
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, weights_only=True, map_location=device())
            for part in ("model", "average", "optimizer"):
                getattr(self, part).load_state_dict(state[part])
            self.step, self.losses = state["step"], state["losses"]

    @property
    def leg(self) -> Leg:
        return next((leg for leg in self.spec.legs if self.step < leg.until), self.spec.legs[-1])

    def learning_rate(self) -> float:
        start, end = self.leg.cosine
        warm, along = min(1.0, (self.step + 1) / 200), (self.step - start) / (end - start)
        return self.leg.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * along)))

    def loss(self) -> Tensor:
        """Everything random follows from (seed, step): the draws, and dropout, which asks the global state."""
        seed = self.spec.seed * 1_000_003 + self.step
        torch.manual_seed(seed)
        return self.task.loss(self.model, torch.Generator(device()).manual_seed(seed), self.spec.batch, self.leg)

    def advance(self) -> Tensor:
        """One step. The loss stays on the device: to read it every time would make a GPU wait."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        decay = min(self.spec.average, self.step / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        return loss.detach()

    def train(self, minutes: float) -> None:
        """Run until done or out of time; a checkpoint about once a minute and at the end."""
        deadline, saved, window = time.monotonic() + 60 * minutes, time.monotonic(), []
        with bar(self.name, self.step, self.spec.steps) as show:
            while self.step < self.spec.steps and time.monotonic() < deadline:
                window.append(self.advance())
                if self.step % SHOW == 0:
                    show(self.step, mean(window[-100:]))
                if self.step % EVERY == 0:
                    self.losses.append([self.step, round(mean(window), 5)])
                    window = []
                    if time.monotonic() - saved > SECONDS:
                        self.save()
                        saved = time.monotonic()
        self.save()


def compile_parts(model: torch.nn.ModuleDict) -> None:
    """In place, so that names in a checkpoint stay. Shapes never change, so the fastest kernels are searched once.

    On a CPU this takes a C++ compiler and two minutes: then 61 images of zoo:cifar10-small a second on one core, 34 without.
    """
    torch.backends.cudnn.benchmark = True
    for part in model.values():
        part.compile()


def mean(losses: list[Tensor]) -> float:
    return torch.stack(losses).mean().item()


@contextmanager
def bar(name: str, start: int, total: int) -> Iterator:
    """A progress bar; yields what moves it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(name, total=total, completed=start)
        yield lambda step, loss: progress.update(task, completed=step, description=f"{name} loss {loss:.4f}")
