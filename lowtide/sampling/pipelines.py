"""Pipelines: what lowtide uses of one, and three that diffusers lacks.

ClassConditionalPipeline draws from UNets that are conditioned on a class; diffusers has such a
pipeline for transformers (DiT) only. UnconditionalPipeline takes any scheduler. ModulePipeline
draws from any module.
"""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Protocol, cast

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    ImagePipelineOutput,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.unet import config_of, height_width
from lowtide.sampling.class_embedder import ClassEmbedder

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
    """A class-conditional UNet and its scheduler, in pixels or in the latents of an autoencoder.

    `vae` decodes latents; it is a VQModel or an AutoencoderKL. `class_embedder` turns a label into
    the token that a UNet2DConditionModel reads. `null_label` is the class that stands for "no
    class", if the model was trained with one.
    """

    model_cpu_offload_seq = "class_embedder->unet->vae"
    _optional_components = ["vae", "class_embedder"]
    unet: UNet2DModel | UNet2DConditionModel
    scheduler: Any
    vae: Any
    class_embedder: ClassEmbedder | None

    # diffusers compares a component with its annotation here, so most name no class.
    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        null_label: int | None = None,
        vae: Any = None,
        class_embedder: Any = None,
    ):
        super().__init__()
        self.register_modules(
            unet=unet, scheduler=scheduler, vae=vae, class_embedder=class_embedder
        )
        self.register_to_config(null_label=null_label)
        _check_classes(self)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: Generators = None,
        output_type: str = "pil",
        eta: float = 0.0,
    ) -> ImagePipelineOutput:
        """One image per label.

        Guidance 1 is the conditional model alone. The default is 2 with a null label, else 1.
        """
        scale = self.guidance(guidance_scale)
        labels = torch.as_tensor(class_labels, device=self._execution_device)
        x = start(self, len(labels), generator, num_inference_steps)
        options = step_options(self.scheduler, generator, eta)
        # diffusers decorates progress_bar, which hides its signature from a type checker.
        for t in cast(Any, self).progress_bar(self.scheduler.timesteps):
            eps = self.predict(self.scheduler.scale_model_input(x, t), t, labels, scale)
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        return finished(self, x, output_type)

    @property
    def null_label(self) -> int | None:
        return config_of(self).null_label

    @property
    def classes(self) -> int:
        """The number of classes, that for none included."""
        table = self.class_embedder
        return config_of(self.unet).num_class_embeds if table is None else config_of(table).classes

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

    def predict(self, x: Tensor, t: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The guided prediction; with guidance, one batch holds both predictions.

        eps = eps_null + scale * (eps_label - eps_null)
        """
        if scale == 1.0:
            return self.unet(x, t, **self.condition(labels)).sample
        null_labels = torch.full_like(labels, cast(int, self.null_label))
        condition = self.condition(torch.cat([labels, null_labels]))
        both = self.unet(torch.cat([x, x]), t, **condition).sample
        with_label, without_label = both.chunk(2)
        return without_label + scale * (with_label - without_label)

    def condition(self, labels: Tensor) -> dict[str, Tensor]:
        """What the UNet reads of the labels."""
        if self.class_embedder is not None:
            return {"encoder_hidden_states": self.class_embedder(labels)}
        return {"class_labels": labels}


def _check_classes(pipe: ClassConditionalPipeline) -> None:
    """A UNet of text reads its class from an embedder, and a UNet of classes has none."""
    reads_text = isinstance(pipe.unet, UNet2DConditionModel)
    if reads_text != (pipe.class_embedder is not None):
        raise BadInput(
            f"found a {type(pipe.unet).__name__} {'without' if reads_text else 'with'} a "
            "class_embedder",
            "a UNet2DConditionModel with one, or a UNet2DModel without",
            "see lowtide.sampling.class_embedder",
        )


class UnconditionalPipeline(DiffusionPipeline):
    """An unconditional UNet with any scheduler, in pixels or in the latents of an autoencoder.

    Those of diffusers (DDIM, DDPM) work with one scheduler each. `heads` is the number of heads of
    every attention, which the configuration of a UNet2DModel cannot say: it has a width of heads.
    """

    model_cpu_offload_seq = "unet->vae"
    _optional_components = ["vae"]
    unet: UNet2DModel
    scheduler: Any
    vae: Any

    def __init__(
        self, unet: UNet2DModel, scheduler: Any, vae: Any = None, heads: int | None = None
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)
        self.register_to_config(heads=heads)
        for module in unet.modules():
            if heads is not None and isinstance(module, Attention):
                module.heads = heads

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        x = start(self, batch_size, generator, num_inference_steps)
        options = step_options(self.scheduler, generator, eta)
        for t in cast(Any, self).progress_bar(self.scheduler.timesteps):
            eps = self.unet(self.scheduler.scale_model_input(x, t), t).sample
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        return finished(self, x, output_type)


OwnPipeline = ClassConditionalPipeline | UnconditionalPipeline
OWN: dict[str, type[OwnPipeline]] = {
    kind.__name__: kind for kind in (ClassConditionalPipeline, UnconditionalPipeline)
}


def start(pipe: OwnPipeline, batch: int, generator: Generators, steps: int) -> Tensor:
    """Pure noise at the scheduler's scale: (batch, channels, height, width)."""
    config = config_of(pipe.unet)
    device = pipe._execution_device
    height, width = height_width(config.sample_size)
    shape = (batch, config.in_channels, height, width)
    pipe.scheduler.set_timesteps(steps, device=device)
    noise = randn_tensor(shape, generator=generator, device=device, dtype=pipe.unet.dtype)
    return noise * pipe.scheduler.init_noise_sigma


def step_options(scheduler: Scheduler, generator: Generators, eta: float) -> dict[str, object]:
    """What the scheduler's `step` takes of the generators and eta."""
    given: dict[str, object] = {"generator": generator, "eta": eta}
    known = signature(scheduler.step).parameters
    return {name: value for name, value in given.items() if name in known}


def finished(pipe: OwnPipeline, x: Tensor, output_type: str) -> ImagePipelineOutput:
    """The images of samples, which the autoencoder decodes if there is one."""
    if pipe.vae is not None:
        x = pipe.vae.decode(x / config_of(pipe.vae).scaling_factor).sample
    images = _as_images(x)
    return ImagePipelineOutput(pipe.numpy_to_pil(images) if output_type == "pil" else images)


@dataclass(eq=False)
class ModulePipeline:
    """The smallest pipeline: any module called (sample, timestep, ...), and a scheduler.

    `shape`: of one sample, without the batch axis. `conditions`: the other arguments by name; each
    image has the row of its seed.
    """

    unet: nn.Module
    scheduler: Scheduler
    shape: tuple[int, ...]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def example(self, batch: int) -> dict[str, Tensor]:
        """The inputs of a call for so many images."""
        first, *_ = signature(self.unet.forward).parameters
        sample = torch.zeros(batch, *self.shape)
        return {first: sample, "timestep": torch.zeros(batch)} | self._rows(range(batch))

    def _rows(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The conditions of these images."""
        return {
            name: value[[seed % len(value) for seed in seeds]]
            for name, value in self.conditions.items()
        }

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
        rows = self._rows([each.initial_seed() for each in generator])
        conditions = {name: value.to(x.device) for name, value in rows.items()}
        for t in self.scheduler.timesteps:
            result = self.unet(scaled(x, t), timestep=t, **conditions)
            eps = result if isinstance(result, Tensor) else result[0]
            x = self.scheduler.step(eps, t, x, **options).prev_sample
        return Images(_as_images(x) if x.dim() == 4 else x.cpu().float().numpy())


@dataclass(frozen=True)
class Images:
    """What a ModulePipeline returns: (batch, height, width, channels), in [0, 1].

    Samples that are no pictures, with more or fewer axes, are returned as they are.
    """

    images: np.ndarray


def _as_images(x: Tensor) -> np.ndarray:
    """(batch, channels, height, width) in [-1, 1] to (batch, height, width, channels) in [0, 1]."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()


def takes_generator(scheduler: Scheduler) -> bool:
    return "generator" in signature(scheduler.step).parameters
