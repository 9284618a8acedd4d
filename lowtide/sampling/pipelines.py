"""Pipelines: what lowtide uses of one, and two that diffusers lacks.

ClassConditionalPipeline draws from UNets that are conditioned on a class; diffusers has such a
pipeline for transformers (DiT) only. ModulePipeline draws from any module.
"""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.unet import config_of, height_width

Generators = torch.Generator | list[torch.Generator] | None
# The guidance scale of a class-conditional pipeline that has a null label.
GUIDANCE = 2.0


class Scheduler(Protocol):
    """What lowtide uses of a diffusers scheduler."""

    @property
    def config(self) -> Any: ...

    @property
    def timesteps(self) -> Tensor: ...

    def set_timesteps(self, num_inference_steps: int, *args: Any, **options: Any) -> None: ...

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> Any: ...


class StepOutput(Protocol):
    """What a diffusers scheduler's step returns, where it returns no tuple."""

    prev_sample: Tensor


class Pipeline(Protocol):
    """What lowtide uses of a diffusers pipeline; its denoiser is an attribute, see drivers.py.

    diffusers sets a pipeline's components at run time, so a type checker does not see that a
    DiffusionPipeline has a scheduler. `as_pipeline` converts one.
    """

    scheduler: Scheduler

    def __call__(self, *args: Any, **options: Any) -> Any: ...


class ClassConditionalPipeline(DiffusionPipeline):
    """A class-conditional UNet2DModel and its scheduler.

    `null_label` is the class that stands for "no class", if the model was trained with one.
    """

    model_cpu_offload_seq = "unet"
    unet: UNet2DModel
    scheduler: Any

    # diffusers compares a component with its annotation here, so `scheduler` names no class.
    def __init__(self, unet: UNet2DModel, scheduler: Any, null_label: int | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(null_label=null_label)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image per label.

        Guidance 1 is the conditional model alone. The default is 2 with a null label, else 1.
        """
        scale = self.guidance(guidance_scale)
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        x = self.start(len(labels), generator, num_inference_steps)
        options = {"generator": generator} if takes_generator(self.scheduler) else {}
        # diffusers decorates progress_bar, which hides its signature from a type checker.
        for t in cast(Any, self).progress_bar(self.scheduler.timesteps):
            eps = self.predict(self.scheduler.scale_model_input(x, t), t, labels, scale)
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        images = _as_images(x)
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

    @property
    def null_label(self) -> int | None:
        return config_of(self).null_label

    def guidance(self, scale: float | None) -> float:
        """The guidance scale to use for the one in the call."""
        if scale is None:
            return 1.0 if self.null_label is None else GUIDANCE
        if self.null_label is None and scale != 1.0:
            raise BadInput(
                f"found guidance {scale:g} and a model without a label for none",
                "guidance 1",
                "set null_label in the pipeline",
            )
        return scale

    def start(self, batch: int, generator: Generators, steps: int) -> Tensor:
        """Pure noise at the scheduler's scale: (batch, channels, height, width)."""
        config = config_of(self.unet)
        device = self._execution_device
        height, width = height_width(config.sample_size)
        shape = (batch, config.in_channels, height, width)
        self.scheduler.set_timesteps(steps, device=device)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        return noise * self.scheduler.init_noise_sigma

    def predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The guided prediction; with guidance, one batch holds both predictions.

        eps = eps_null + scale * (eps_label - eps_null)
        """
        if scale == 1.0:
            return self.unet(x, t, class_labels=labels).sample
        null_labels = torch.full_like(labels, cast(int, self.null_label))
        both_labels = torch.cat([labels, null_labels])
        both = self.unet(torch.cat([x, x]), t, class_labels=both_labels).sample
        with_label, without_label = both.chunk(2)
        return without_label + scale * (with_label - without_label)


@dataclass(eq=False)
class ModulePipeline:
    """The smallest pipeline: any module called (sample, timestep), and a scheduler.

    `shape`: of one sample, without the batch axis.
    """

    unet: nn.Module
    scheduler: Scheduler
    shape: tuple[int, ...]

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        generator: list[torch.Generator],
        num_inference_steps: int,
        output_type: str,
    ) -> "Images":
        parameter = next(self.unet.parameters())
        noise = [torch.randn(self.shape, generator=each) for each in generator]
        x = torch.stack(noise).to(parameter)
        self.scheduler.set_timesteps(num_inference_steps)
        # Flow-matching schedulers start from plain noise and scale nothing: they lack both names.
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        options = {"generator": generator} if takes_generator(self.scheduler) else {}
        for t in self.scheduler.timesteps:
            result = self.unet(scaled(x, t), t)
            eps = result if isinstance(result, Tensor) else result[0]
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        return Images(_as_images(x))


@dataclass(frozen=True)
class Images:
    """What a ModulePipeline returns: (batch, height, width, channels), in [0, 1]."""

    images: np.ndarray


def _as_images(x: Tensor) -> np.ndarray:
    """(batch, channels, height, width) in [-1, 1] to (batch, height, width, channels) in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()


def takes_generator(scheduler: Scheduler) -> bool:
    return "generator" in signature(scheduler.step).parameters
