"""The zoo's training loop: one for all models; a resumed run reaches the same weights."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from training.batches import device
from training.catalogue import ZOO_MODELS
from training.phases import TrainingPhase

STEPS_PER_RECORD = 250
STEPS_PER_DISPLAY = 10
SECONDS_PER_CHECKPOINT = 60
WARMUP_STEPS = 200


class Trainer:
    """The training state: weights, their moving average, the optimizer, the step and the losses."""

    def __init__(self, name: str, data: Path, out: Path, *, compiled: bool = False):
        self.name = name
        self.out = out
        self.zoo_model = ZOO_MODELS[name]
        torch.manual_seed(self.zoo_model.seed)
        self.task = self.zoo_model.task(data)
        self.model = self.task.parts.train().to(device(), memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model)
        self.step = 0
        self.losses: list[list[float]] = []
        on_gpu = device().type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            self.phase.rate,
            weight_decay=1e-4,
            fused=on_gpu,
        )
        if on_gpu or compiled:
            compile_parts(self.model)

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def save(self) -> None:
        """Write a new file, then rename it: a run killed while saving loses nothing."""
        self.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }
        unfinished = self.checkpoint.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.checkpoint)

    def resume(self) -> None:
        """Continue from the last checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True, map_location=device())
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.losses = state["losses"]

    @property
    def phase(self) -> TrainingPhase:
        phases = self.zoo_model.phases
        return next((phase for phase in phases if self.step < phase.until), phases[-1])

    def learning_rate(self) -> float:
        """A linear warm-up, then a cosine from the phase's rate down to 2 % of it."""
        start, end = self.phase.cosine
        warmup = min(1.0, (self.step + 1) / WARMUP_STEPS)
        progress = (self.step - start) / (end - start)
        return self.phase.rate * warmup * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def loss(self) -> Tensor:
        """The loss of the current step.

        (seed, step) alone sets all randomness: the generator of the batch, and the global state,
        which dropout uses.
        """
        seed = self.zoo_model.seed * 1_000_003 + self.step
        torch.manual_seed(seed)
        generator = torch.Generator(device()).manual_seed(seed)
        return self.task.loss(self.model, generator, self.zoo_model.batch, self.phase)

    def advance(self) -> Tensor:
        """Do one training step. The loss stays on the device; reading it would stall a GPU."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        loss = self.loss()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.update_average()
        return loss.detach()

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the weights. In the first steps the decay is smaller."""
        decay = min(self.zoo_model.average, self.step / (self.step + 10))
        averages = list(self.average.parameters())
        torch._foreach_lerp_(averages, list(self.model.parameters()), 1 - decay)

    def train(self, minutes: float) -> None:
        """Train until the last step or the deadline.

        A checkpoint is written about once a minute and at the end.
        """
        deadline = time.monotonic() + 60 * minutes
        last_save = time.monotonic()
        losses = []
        with progress_bar(self.name, self.step, self.zoo_model.steps) as show:
            while self.step < self.zoo_model.steps and time.monotonic() < deadline:
                losses.append(self.advance())
                if self.step % STEPS_PER_DISPLAY == 0:
                    show(self.step, mean(losses[-100:]))
                if self.step % STEPS_PER_RECORD == 0:
                    self.losses.append([self.step, round(mean(losses), 5)])
                    losses = []
                    if time.monotonic() - last_save > SECONDS_PER_CHECKPOINT:
                        self.save()
                        last_save = time.monotonic()
        self.save()


def compile_parts(model: torch.nn.ModuleDict) -> None:
    """Compile all parts in place, so that the names in a checkpoint do not change.

    Shapes never change, so cuDNN searches its fastest kernels once. On a CPU, compiling needs a C++
    compiler and two minutes; zoo:cifar10-small then trains on 61 images a second on one core
    instead of 34.
    """
    torch.backends.cudnn.benchmark = True
    for part in model.values():
        part.compile()


def mean(losses: list[Tensor]) -> float:
    return torch.stack(losses).mean().item()


@contextmanager
def progress_bar(name: str, start: int, total: int) -> Iterator[Callable[[int, float], None]]:
    """Show a progress bar; yields a function that sets its step and loss."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=total, completed=start)

        def show(step: int, loss: float) -> None:
            progress.update(bar, completed=step, description=f"{name} loss {loss:.4f}")

        yield show
