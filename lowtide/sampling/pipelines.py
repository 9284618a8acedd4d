"""A pipeline for UNets that are told which class to draw; diffusers has one for transformers (DiT) only."""

from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lowtide.errors import BadInput


class Scheduler(Protocol):
    """What lowtide uses of a diffusers scheduler."""

    config: Any
    timesteps: Tensor

    def set_timesteps(self, num_inference_steps: int, *args: Any, **options: Any) -> None: ...

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> Any: ...


class Pipeline(Protocol):
    """What lowtide uses of a diffusers pipeline; its components are found by name."""

    scheduler: Any

    def __call__(self, *args: Any, **options: Any) -> Any: ...


GUIDANCE = 2.0


class ClassConditionalPipeline(DiffusionPipeline):
    """A class-conditional UNet2DModel and its scheduler; `null_label` is the class that was trained to mean none."""

    model_cpu_offload_seq = "unet"

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
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One image per label. Guidance 1 is the conditional model alone; left out, it is 2 where a null label is."""
        scale = self.guidance(guidance_scale)
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        x = self.start(len(labels), generator, num_inference_steps)
        own = (
            {"generator": generator}
            if "generator" in signature(self.scheduler.step).parameters
            else {}
        )
        for t in self.progress_bar(self.scheduler.timesteps):
            eps = self.predict(self.scheduler.scale_model_input(x, t), t, labels, scale)
            x = self.scheduler.step(eps, t, x, **own).prev_sample
        images = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()
        return ImagePipelineOutput(self.numpy_to_pil(images) if output_type == "pil" else images)

    def guidance(self, asked: float | None) -> float:
        """The guidance scale that is meant."""
        null = self.config.null_label
        if null is None and asked not in (None, 1.0):
            raise BadInput(
                f"found guidance {asked:g} and a model without a label for none",
                "guidance 1",
                "set null_label in the pipeline",
            )
        return (1.0 if null is None else GUIDANCE) if asked is None else asked

    def start(self, batch: int, generator: Any, steps: int) -> Tensor:
        """Pure noise, as the scheduler wants it."""
        size, device = self.unet.config.sample_size, self._execution_device
        height, width = (size, size) if isinstance(size, int) else size
        shape = (batch, self.unet.config.in_channels, height, width)
        self.scheduler.set_timesteps(steps, device=device)
        return (
            randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
            * self.scheduler.init_noise_sigma
        )

    def predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The denoiser's answer; with guidance, labelled and unlabelled in one batch."""
        if scale == 1.0:
            return self.unet(x, t, class_labels=labels).sample
        none = torch.full_like(labels, self.config.null_label)
        told, untold = self.unet(
            torch.cat([x, x]), t, class_labels=torch.cat([labels, none])
        ).sample.chunk(2)
        return untold + scale * (told - untold)


@dataclass(frozen=True)
class ModulePipeline:
    """The smallest pipeline: any module called (sample, timestep), a scheduler, and the shape of one sample."""

    def __init__(self, unet: nn.Module, scheduler: Any, shape: tuple[int, ...]):
        self.unet, self.scheduler, self.shape = unet, scheduler, shape

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int,
        generator: list[torch.Generator],
        num_inference_steps: int,
        output_type: str,
    ) -> Any:
        parameter = next(self.unet.parameters())
        x = torch.stack([torch.randn(self.shape, generator=each) for each in generator]).to(
            parameter
        )
        self.scheduler.set_timesteps(num_inference_steps)
        # Flow-matching schedulers start from plain noise and scale nothing, so they lack both names.
        x = x * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)
        own = {"generator": generator} if takes_generator(self.scheduler) else {}
        for t in self.scheduler.timesteps:
            eps = self.unet(scaled(x, t), t)
            x = self.scheduler.step(
                eps if isinstance(eps, Tensor) else eps[0], t, x, **own
            ).prev_sample
        return Images((x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy())


@dataclass(frozen=True)
class Images:
    """What a pipeline answers with."""

    images: np.ndarray


def takes_generator(scheduler: Any) -> bool:
    return "generator" in signature(scheduler.step).parameters
