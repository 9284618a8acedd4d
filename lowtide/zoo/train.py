"""Train a zoo model: `python -m lowtide.zoo.train digits`.

Every step draws its images, noise and timesteps from (seed, step) alone, so a killed run resumes from its last
checkpoint to the same weights. What ships is the moving average, in fp16, as an ordinary diffusers folder.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler, UNet2DModel
from PIL import Image
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from lowtide import zoo


@dataclass(frozen=True)
class Leg:
    """A stretch of training: the step it ends at, a cosine of the learning rate, and how much each noise level counts.

    With `snr_cap` (Hang et al., 2023) a timestep weighs min(snr, cap) / snr: fine detail, which the loss is full of, no
    longer drowns the shape of the whole. None weighs all alike.
    """

    until: int
    rate: float
    cosine: tuple[int, int]
    snr_cap: float | None = None


@dataclass(frozen=True)
class Spec:
    """What is trained, on what, and for how long."""

    model: Callable[[], UNet2DModel]
    images: Callable[[Path], torch.Tensor]
    data: str
    legs: tuple[Leg, ...]
    batch: int = 64
    average: float = 0.999
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.legs[-1].until


def digits_model() -> UNet2DModel:
    """A 1.1 M parameter UNet: three levels, attention at 8 x 8 and in the middle."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def mnist_images(data: Path) -> torch.Tensor:
    """MNIST padded to 32 x 32, uint8."""
    images = torch.from_numpy(np.load(data / "mnist" / "mnist.npz")["train_x"]).reshape(-1, 1, 28, 28)
    return F.pad(images, (2, 2, 2, 2))


MNIST = "MNIST (CC BY-SA 3.0), 60,000 images padded to 32 x 32"
DIGITS = (Leg(8_000, 1e-3, (0, 8_000)), Leg(12_000, 1e-3, (0, 12_000)), Leg(18_000, 6e-4, (12_000, 18_000), snr_cap=5.0))
SPECS = {"digits": Spec(digits_model, mnist_images, MNIST, DIGITS)}


class Trainer:
    """The float training loop: weights, their moving average, and the step they stand at."""

    def __init__(self, name: str, data: Path, out: Path):
        self.name, self.out, self.spec = name, out, SPECS[name]
        torch.manual_seed(self.spec.seed)
        self.model = self.spec.model().to(memory_format=torch.channels_last)
        self.average = self.spec.model()
        self.average.load_state_dict(self.model.state_dict())
        self.noising = DDPMScheduler(num_train_timesteps=1000)
        self.images = self.spec.images(data)
        self.step, self.losses = 0, []
        self.optimizer = torch.optim.AdamW(self.model.parameters(), self.leg.rate, weight_decay=1e-4)

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
            state = torch.load(self.checkpoint, weights_only=True)
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

    def weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        """How much each noise level counts."""
        if self.leg.snr_cap is None:
            return torch.ones(len(timesteps))
        signal = self.noising.alphas_cumprod[timesteps]
        snr = signal / (1 - signal)
        return snr.clamp(max=self.leg.snr_cap) / snr

    def loss(self) -> torch.Tensor:
        draw = torch.Generator().manual_seed(self.spec.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(self.images), (self.spec.batch,), generator=draw)
        clean = self.images[chosen].float() / 127.5 - 1
        noise = torch.randn(clean.shape, generator=draw)
        timesteps = torch.randint(1000, (self.spec.batch,), generator=draw)
        noisy = self.noising.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = self.model(noisy, timesteps).sample
        errors = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
        return (errors * self.weights(timesteps)).mean()

    def advance(self) -> float:
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
        return loss.item()

    def train(self, minutes: float) -> None:
        """Run until done or out of time; a checkpoint every 250 steps and at the end."""
        deadline, window = time.monotonic() + 60 * minutes, []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns) as progress:
            task = progress.add_task(self.name, total=self.spec.steps, completed=self.step)
            while self.step < self.spec.steps and time.monotonic() < deadline:
                window.append(self.advance())
                progress.update(task, completed=self.step, description=f"{self.name} loss {np.mean(window[-100:]):.4f}")
                if self.step % 250 == 0:
                    self.losses.append([self.step, round(float(np.mean(window)), 5)])
                    window = []
                    self.save()
        self.save()


def export(trainer: Trainer, folder: Path) -> None:
    """The moving average as a diffusers folder in fp16, with its card and a grid of samples."""
    pipe = DDIMPipeline(trainer.average.eval().half(), DDIMScheduler(num_train_timesteps=1000))
    pipe.save_pretrained(folder)
    pipe = DDIMPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(64, generator=torch.Generator().manual_seed(1), num_inference_steps=50, output_type="np").images
    grid = images.reshape(8, 8, *images.shape[1:]).transpose(0, 2, 1, 3, 4).reshape(8 * 32, 8 * 32)
    Image.fromarray((grid * 255).round().astype("uint8")).resize((512, 512), Image.NEAREST).save(folder / "samples.png")
    (folder / "README.md").write_text(card(trainer))


def card(trainer: Trainer) -> str:
    spec, count = trainer.spec, sum(p.numel() for p in trainer.average.parameters())
    legs = "\n".join(f"- {describe(leg)}" for leg in spec.legs if leg.until <= trainer.step or leg == trainer.leg)
    rows = "\n".join(f"| {step} | {loss} |" for step, loss in trainer.losses[3::4])
    return (
        f"# zoo:{trainer.name}\n\nTrained by `python -m lowtide.zoo.train {trainer.name}` on {spec.data}.\n"
        f"{count:,} parameters, {trainer.step} steps of {spec.batch} images, AdamW, moving average {spec.average}, "
        f"seed {spec.seed}, bf16 autocast, in legs:\n\n{legs}\n\n"
        f"![64 DDIM-50 samples, seed 1](samples.png)\n\n| step | loss |\n|---|---|\n{rows}\n"
    )


def describe(leg: Leg) -> str:
    start, end = leg.cosine
    cap = "" if leg.snr_cap is None else f", noise levels weighed by min(snr, {leg.snr_cap:g}) / snr"
    return f"to step {leg.until:,}: rate {leg.rate:g} on a cosine from {start:,} to {end:,}{cap}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=sorted(SPECS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder that holds mnist/mnist.npz")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after this long; run again to go on")
    parser.add_argument("--out", type=Path, help="where checkpoints go (default runs/zoo-NAME)")
    parser.add_argument("--export", action="store_true", help="write the package's folder from the last checkpoint and stop")
    options = parser.parse_args()
    trainer = Trainer(options.name, options.data, options.out or Path("runs") / f"zoo-{options.name}")
    trainer.resume()
    if not options.export:
        trainer.train(options.minutes)
    export(trainer, zoo.FOLDER / options.name)
    print(json.dumps({"step": trainer.step, "loss": trainer.losses[-1:], "folder": f"zoo:{options.name}"}))


if __name__ == "__main__":
    main()
