"""Samplers by name: a pipeline that shares all models with another one and has another scheduler.

Some pipelines of diffusers are made for one kind of scheduler. Those of DDIM and DDPM pass theirs
arguments that no other takes, so another scheduler comes with an UnconditionalPipeline. DiT's and
LDM's text-to-image pipeline do not scale the sample, which some schedulers need.
"""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

from copy import copy
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, cast

import diffusers
from torch import nn

from lowtide.errors import BadInput
from lowtide.sampling.pipelines import Pipeline, Scheduler, UnconditionalPipeline
from lowtide.sampling.quadratic_ddim import QuadraticDDIMScheduler
from lowtide.settings import SchedulerName, SpacingName


@dataclass(frozen=True)
class Sampler:
    """A scheduler of diffusers.

    changes: values of its configuration.
    scales: the denoiser reads the sample divided by a number, which the pipeline must do.
    """

    kind: str
    changes: dict[str, object] = field(default_factory=dict)
    scales: bool = False


SAMPLERS: dict[SchedulerName, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    # Without Runge-Kutta steps it is PLMS, the sampler of Stable Diffusion's own code.
    "pndm": Sampler("PNDMScheduler", {"skip_prk_steps": True}),
    "dpmsolver++": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", scales=True),
    "euler_a": Sampler("EulerAncestralDiscreteScheduler", scales=True),
    "heun": Sampler("HeunDiscreteScheduler", scales=True),
    "lms": Sampler("LMSDiscreteScheduler", scales=True),
    "deis": Sampler("DEISMultistepScheduler"),
    "lcm": Sampler("LCMScheduler"),
}
# Pipelines that give the denoiser the sample as it is.
UNSCALED = ("DiTPipeline", "LDMTextToImagePipeline")
# Pipelines around a bare UNet, and the one scheduler whose `step` each of them calls rightly.
BARE = {"DDIMPipeline": "DDIMScheduler", "DDPMPipeline": "DDPMScheduler"}


def scheduled(
    pipe: Pipeline, name: SchedulerName | None, spacing: SpacingName | None = None
) -> Pipeline:
    """The pipeline with this sampler and spacing; the given one itself if nothing is asked."""
    if name is None and spacing is None:
        return pipe
    scheduler = scheduler_like(pipe.scheduler, name, spacing)
    title = type(pipe).__name__
    if title in UNSCALED and any(
        sampler.scales and sampler.kind == type(scheduler).__name__ for sampler in SAMPLERS.values()
    ):
        names = ", ".join(name for name, sampler in SAMPLERS.items() if not sampler.scales)
        raise BadInput(
            f"found scheduler {name} for a {title}, which does not scale the sample for it",
            f"one of {names}",
            "choose another scheduler",
        )
    if title in (*BARE, "UnconditionalPipeline") and getattr(pipe, "vae", None) is None:
        return around_unet(cast(Any, pipe).unet, scheduler)
    other = copy(pipe)
    other.scheduler = scheduler
    return other


def around_unet(unet: nn.Module, scheduler: Scheduler) -> Pipeline:
    """A pipeline of diffusers where one calls this scheduler rightly, else lowtide's own."""
    found = next((title for title, kind in BARE.items() if kind == type(scheduler).__name__), None)
    kind: Any = getattr(diffusers, found) if found else UnconditionalPipeline
    return cast(Pipeline, kind(unet=unet, scheduler=scheduler))


def scheduler_like(
    own: Scheduler, name: SchedulerName | None, spacing: SpacingName | None
) -> Scheduler:
    """The scheduler of that name for the noise schedule that the model was trained with."""
    title = type(own).__name__
    if "prediction_type" not in own.config or title.startswith("FlowMatch"):
        raise BadInput(
            f"found {f'scheduler {name}' if name else f'spacing {spacing}'} for a model with a "
            f"{title}",
            "a model of diffusion, with alphas and betas",
            "leave scheduler and spacing out",
        )
    if spacing == "quadratic":
        return _quadratic(own, name)
    sampler = SAMPLERS[name] if name else Sampler(title)
    if title == QuadraticDDIMScheduler.__name__ and name is None:
        sampler = SAMPLERS["ddim"]
    kind: Any = getattr(diffusers, sampler.kind)
    changes = dict(sampler.changes)
    if spacing is not None:
        if "timestep_spacing" not in signature(kind.__init__).parameters:
            raise BadInput(
                f"found spacing {spacing} with a {sampler.kind}",
                "a scheduler whose timesteps can be spread differently",
                "leave spacing out",
            )
        changes["timestep_spacing"] = spacing
    return kind.from_config(_whole_config(own), **changes)


def _whole_config(own: Scheduler) -> dict[str, Any]:
    """The scheduler's configuration, with all values that differ from its defaults.

    A pipeline may change a value after the scheduler was made, such as Stable Diffusion
    `steps_offset`; diffusers would still take it for a default and leave it behind. And a file
    holds defaults too, which diffusers would carry over: a model that was saved would then get
    other timesteps than before.
    """
    config = dict(own.config)
    parameters = signature(type(own).__init__).parameters
    config["_use_default_values"] = [
        name
        for name, value in config.items()
        if name in parameters and value == parameters[name].default
    ]
    return config


def _quadratic(own: Scheduler, name: SchedulerName | None) -> QuadraticDDIMScheduler:
    is_ddim = type(own).__name__ in ("DDIMScheduler", QuadraticDDIMScheduler.__name__)
    if name not in (None, "ddim") or (name is None and not is_ddim):
        raise BadInput(
            f"found spacing quadratic with {name or f'a {type(own).__name__}'}",
            "DDIM, whose code it is from",
            "give scheduler ddim, or another spacing",
        )
    plain = {"thresholding": False, "clip_sample_range": 1.0, "rescale_betas_zero_snr": False}
    for key, value in plain.items():
        if own.config.get(key, value) != value:
            raise BadInput(
                f"found spacing quadratic with {key} {own.config[key]}",
                f"{key} {value}, as DDIM's own code has it",
                "give another spacing",
            )
    known = signature(QuadraticDDIMScheduler.__init__).parameters
    config: dict[str, Any] = {key: value for key, value in own.config.items() if key in known}
    return QuadraticDDIMScheduler(**config)
