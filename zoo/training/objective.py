"""The loss of every zoo denoiser: the weighted squared error of the predicted noise."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from training.phases import TrainingPhase


def snr_weights(scheduler: DDPMScheduler, timesteps: Tensor, cap: float | None) -> Tensor:
    """The weight of each timestep's error: min(snr, cap) / snr, or 1 without a cap: (batch,)."""
    if cap is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    signal = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
    snr = signal / (1 - signal)
    return snr.clamp(max=cap) / snr


def noise_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    clean: Tensor,
    generator: torch.Generator,
    scheduler: DDPMScheduler,
    phase: TrainingPhase,
) -> Tensor:
    """The weighted squared error of `predict(noisy, timesteps)`, a scalar.

    clean: images or latents, (batch, channels, height, width).
    """
    where = generator.device
    noise = torch.randn(clean.shape, generator=generator, device=where)
    count = scheduler.config.num_train_timesteps
    timesteps = torch.randint(count, (len(clean),), generator=generator, device=where)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    noisy = noisy.contiguous(memory_format=torch.channels_last)
    with torch.autocast(where.type, torch.bfloat16):
        predicted = predict(noisy, timesteps)
    errors = F.mse_loss(predicted.float(), noise, reduction="none").flatten(1).mean(1)
    return (errors * snr_weights(scheduler, timesteps, phase.snr_cap)).mean()
