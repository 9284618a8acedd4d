"""What every zoo model learns: to tell the noise in a noisy image, from (seed, step) alone."""

from collections.abc import Callable, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor


@dataclass(frozen=True)
class Leg:
    """A stretch of training: the step it ends at, a cosine of the learning rate, and how much each noise level counts.

    With `snr_cap` (Hang et al., 2023) a timestep weighs min(snr, cap) / snr: fine detail, which the loss is full of, no
    longer drowns the shape of the whole. None weighs all alike. With `typical` below 1 a task that can rank its images
    learns from that share of them, the most typical of each class: a small model then draws fewer kinds, each better.
    """

    until: int
    rate: float
    cosine: tuple[int, int]
    snr_cap: float | None = None
    typical: float = 1.0

    def describe(self) -> str:
        start, end = self.cosine
        cap = "" if self.snr_cap is None else f", noise levels weighed by min(snr, {self.snr_cap:g}) / snr"
        share = "" if self.typical == 1 else f", on the {self.typical:.0%} most typical images of each class"
        return f"to step {self.until:,}: rate {self.rate:g} on a cosine from {start:,} to {end:,}{cap}{share}"


def one_leg(steps: int, rate: float, snr_cap: float | None = None) -> tuple[Leg, ...]:
    return (Leg(steps, rate, (0, steps), snr_cap),)


def device() -> torch.device:
    """Where training happens: on a CUDA GPU when there is one. Data that a step reads lies there too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(things: Sized, draw: torch.Generator, batch: int) -> Tensor:
    """The places of one batch, drawn with repetition."""
    return torch.randint(len(things), (batch,), generator=draw, device=draw.device)


def typical_first(images: Tensor, labels: Tensor, neighbours: int = 50) -> Tensor:
    """Places of all images, each class by itself from its most typical to its oddest, the classes taken in turns.

    Typical is what lies near others of its class: by the mean distance to its nearest neighbours, at half the size and
    all equally bright, so that thin strokes count as much as thick ones.
    """
    small = F.normalize(F.avg_pool2d(images.float(), 2).flatten(1), dim=1)
    turn = torch.empty(len(images), device=images.device)
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        kind = small[places]
        near = min(neighbours + 1, len(kind))
        nearest = [torch.cdist(part, kind).topk(near, largest=False).values[:, 1:] for part in kind.split(1000)]
        turn[places] = torch.cat(nearest).mean(1).argsort().argsort() / len(places)
    return turn.argsort(stable=True)


def happens(probability: float, draw: torch.Generator, batch: int) -> Tensor:
    """One coin per image: a flip, a condition left out."""
    return torch.rand(batch, generator=draw, device=draw.device) < probability


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, cap: float | None) -> Tensor:
    """How much each noise level counts in the error of the noise."""
    if cap is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = signal / (1 - signal)
    return snr.clamp(max=cap) / snr


def noise_loss(
    predict: Callable[..., Tensor], clean: Tensor, draw: torch.Generator, scheduler: DDPMScheduler, leg: Leg, **conditions: Any
) -> Tensor:
    """Weighed squared error of the predicted noise; `predict(noisy, timesteps, **conditions)`."""
    place = draw.device
    noise = torch.randn(clean.shape, generator=draw, device=place)
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(clean),), generator=draw, device=place)
    noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
    with torch.autocast(place.type, torch.bfloat16):
        predicted = predict(noisy, timesteps, **conditions)
    errors = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
    return (errors * snr_weights(scheduler, timesteps, leg.snr_cap)).mean()
