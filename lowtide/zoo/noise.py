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
    longer drowns the shape of the whole. None weighs all alike.
    """

    until: int
    rate: float
    cosine: tuple[int, int]
    snr_cap: float | None = None

    def describe(self) -> str:
        start, end = self.cosine
        cap = "" if self.snr_cap is None else f", noise levels weighed by min(snr, {self.snr_cap:g}) / snr"
        return f"to step {self.until:,}: rate {self.rate:g} on a cosine from {start:,} to {end:,}{cap}"


def one_leg(steps: int, rate: float, snr_cap: float | None = None) -> tuple[Leg, ...]:
    return (Leg(steps, rate, (0, steps), snr_cap),)


def device() -> torch.device:
    """Where training happens: on a CUDA GPU when there is one. Data that a step reads lies there too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def chosen(things: Sized, draw: torch.Generator, batch: int) -> Tensor:
    """The places of one batch, drawn with repetition."""
    return torch.randint(len(things), (batch,), generator=draw, device=draw.device)


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
