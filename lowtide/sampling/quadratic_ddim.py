"""DDIM with quadratic spacing, which diffusers' DDIMScheduler lacks: its steps have one stride.

As in DDIM's own code (`skip_type: quad`), tau = floor(linspace(0, sqrt(0.8 T), S)^2), and the last
step ends at alpha-bar 1. Near the image several tau are the same number; a step from t to t changes
nothing, so each t is visited once, and there may be fewer steps than S.
"""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from typing import Any, cast

import numpy as np
import torch
from diffusers import ConfigMixin, DDIMScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

# The share of the schedule that the code visits.
REACH = 0.8


class QuadraticDDIMScheduler(SchedulerMixin, ConfigMixin):
    """DDIM on timesteps that are close together near the image."""

    order = 1

    @register_to_config
    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        clip_sample: bool = True,
        prediction_type: str = "epsilon",
    ):
        uniform = DDIMScheduler(
            num_train_timesteps,
            beta_start,
            beta_end,
            beta_schedule,
            cast(Any, trained_betas),
        )
        self.add_noise = uniform.add_noise
        self.alphas_cumprod = uniform.alphas_cumprod
        self.final_alpha_cumprod = torch.tensor(1.0)
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)

    def set_timesteps(
        self, num_inference_steps: int, device: str | torch.device | None = None
    ) -> None:
        reach = np.sqrt(cast(Any, self.config).num_train_timesteps * REACH)
        quadratic = (np.linspace(0, reach, num_inference_steps) ** 2).astype(np.int64)
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.from_numpy(np.unique(quadratic)[::-1].copy()).to(device)

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """The sample itself: DDIM scales nothing."""
        return sample

    def previous_timestep(self, timestep: Tensor | int) -> int:
        """The timestep that the step ends at; -1 is the image."""
        later = self.timesteps[self.timesteps < int(timestep)]
        return int(later[0]) if len(later) else -1

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | int,
        sample: Tensor,
        *,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, Tensor]:
        """x_t to the next x: formulas 12 and 16 of DDIM."""
        previous = self.previous_timestep(timestep)
        alpha = self.alphas_cumprod[int(timestep)]
        alpha_next = self.alphas_cumprod[previous] if previous >= 0 else self.final_alpha_cumprod
        x0, eps = self._predicted(model_output, sample, alpha)
        if cast(Any, self.config).clip_sample:
            x0 = x0.clamp(-1, 1)
        sigma = eta * ((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next)).sqrt()
        direction = (1 - alpha_next - sigma**2).clamp(min=0).sqrt() * eps
        x = alpha_next.sqrt() * x0 + direction
        if eta > 0:
            noise = variance_noise
            if noise is None:
                like = {"device": model_output.device, "dtype": model_output.dtype}
                noise = randn_tensor(model_output.shape, generator=generator, **like)
            x = x + sigma * noise
        return DDIMSchedulerOutput(x, x0) if return_dict else (x, x0)

    def _predicted(self, answer: Tensor, x: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
        """The image and the noise that the denoiser's answer stands for."""
        signal = alpha.sqrt()
        noise = (1 - alpha).sqrt()
        kind = cast(Any, self.config).prediction_type
        if kind == "v_prediction":
            return signal * x - noise * answer, signal * answer + noise * x
        if kind == "sample":
            return answer, (x - signal * answer) / noise
        return (x - noise * answer) / signal, answer

    def __len__(self) -> int:
        return cast(Any, self.config).num_train_timesteps
