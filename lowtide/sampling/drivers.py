"""Drivers: with which arguments each kind of pipeline is called for a request, and what it cannot take."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.sampling.pipelines import ModulePipeline
from lowtide.sampling.request import Request, read_prompts


def denoiser_name(pipe: Any) -> str:
    """Which component of the pipeline is called at every step."""
    for name in ("unet", "transformer"):
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise BadInput(
        f"found {type(pipe).__name__} without unet or transformer",
        "a diffusion pipeline",
        "load another model",
    )


def denoiser(pipe: Any) -> nn.Module:
    return getattr(pipe, denoiser_name(pipe))


def unconditional(pipe: Any, request: Request) -> dict[str, Any]:
    if (
        not isinstance(pipe, ModulePipeline)
        and next(denoiser(pipe).parameters()).dtype == torch.bfloat16
    ):
        reason = f"found a {type(pipe).__name__} in bfloat16, of which diffusers makes no pictures"
        raise BadInput(reason, "float16 or float32", "convert it")
    return {"batch_size": len(request.seeds)}


def label_guided(pipe: Any, request: Request) -> dict[str, Any]:
    if not request.labels:
        raise BadInput(
            "found a class-conditional model and no labels",
            "the classes to draw",
            "give --labels, such as --labels 0-9",
        )
    guidance = {} if request.guidance is None else {"guidance_scale": request.guidance}
    return {"class_labels": request.dealt(request.labels)} | guidance


def prompted(pipe: Any, request: Request) -> dict[str, Any]:
    guidance = {} if request.guidance is None else {"guidance_scale": request.guidance}
    size = {} if request.size is None else {"height": request.size, "width": request.size}
    return {"prompt": request.dealt(request.prompts or read_prompts(None))} | guidance | size


def binned(pipe: Any, request: Request) -> dict[str, Any]:
    """PixArt moves sizes to its own list of them; a size that was asked for stays."""
    return prompted(pipe, request) | (
        {} if request.size is None else {"use_resolution_binning": False}
    )


WORDS = ("prompts", "guidance", "size")

HEEDED = {unconditional: (), label_guided: ("labels", "guidance"), prompted: WORDS, binned: WORDS}

DRIVERS: dict[str, Callable[[Any, Request], dict[str, Any]]] = {
    "DDPMPipeline": unconditional,
    "DDIMPipeline": unconditional,
    "LDMPipeline": unconditional,
    "ModulePipeline": unconditional,
    "DiTPipeline": label_guided,
    "ClassConditionalPipeline": label_guided,
    "StableDiffusionPipeline": prompted,
    "StableDiffusionXLPipeline": prompted,
    "PixArtAlphaPipeline": binned,
    "PixArtSigmaPipeline": binned,
    "StableDiffusion3Pipeline": prompted,
    "FluxPipeline": prompted,
}


def call_arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What the pipeline is called with for one batch."""
    driver = DRIVERS.get(type(pipe).__name__)
    if driver is None:
        raise BadInput(
            f"found {type(pipe).__name__}",
            f"one of {', '.join(DRIVERS)}",
            "write a driver in lowtide/sampling/drivers.py",
        )
    check_heeded(pipe, request)
    check_model_labels(pipe, request)
    check_steps(pipe.scheduler, request.steps)
    generators = [torch.Generator().manual_seed(seed) for seed in request.seeds]
    steps = {"num_inference_steps": request.steps, "generator": generators, "output_type": "np"}
    return steps | driver(pipe, request) | noise_asked(pipe, request)


def noise_asked(pipe: Any, request: Request) -> dict[str, float]:
    """eta, of a pipeline that takes it and a scheduler that heeds it: Stable Diffusion would drop it for any but DDIM's."""
    if request.eta is None:
        return {}
    if not all(
        "eta" in signature(each).parameters for each in (pipe.__call__, pipe.scheduler.step)
    ):
        raise BadInput(
            f"found eta {request.eta:g} for a {type(pipe).__name__} with a {type(pipe.scheduler).__name__}",
            "a pipeline and a scheduler that take it, such as DDIM's",
            "leave --eta away, or change the pipeline's scheduler",
        )
    return {"eta": request.eta}


def heeded(pipe: Any) -> tuple[str, ...]:
    """What of a request this pipeline hears of."""
    return HEEDED[DRIVERS[type(pipe).__name__]]


def check_heeded(pipe: Any, request: Request) -> None:
    """Nothing may be asked for that this pipeline would not hear of."""
    kind = type(pipe).__name__
    for name in ("prompts", "labels", "guidance", "size"):
        if name not in heeded(pipe) and getattr(request, name) not in (None, ()):
            takes = f"a pipeline that takes it; {kind} takes {' and '.join(heeded(pipe)) or 'nothing of the kind'}"
            raise BadInput(f"found {name} for a {kind}", takes, f"leave --{name} away")


def check_model_labels(pipe: Any, request: Request) -> None:
    """Labels must be classes that the model has; a UNet that needs them needs a pipeline that gives them."""
    config = getattr(denoiser(pipe), "config", {})
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds")
    if classes and (wrong := [label for label in request.labels if not 0 <= label < classes]):
        raise BadInput(
            f"found label {wrong[0]}",
            f"0 to {classes - 1}",
            "choose labels the model was trained on",
        )
    if config.get("num_class_embeds") and DRIVERS[type(pipe).__name__] is not label_guided:
        found = (
            f"found a class-conditional model in a {type(pipe).__name__}, which gives it no labels"
        )
        raise BadInput(
            found, "a pipeline that passes labels", "wrap it in a pipeline with class_labels"
        )


def check_steps(scheduler: Any, steps: int) -> None:
    """No more steps than the model was trained on; PNDM's first steps, where it takes them, want four."""
    config = getattr(scheduler, "config", {})
    most = config.get("num_train_timesteps", steps)
    if steps > most:
        raise BadInput(
            f"found {steps} steps",
            f"at most {most}, those of the model's training",
            "give fewer --steps",
        )
    if steps < 4 and config.get("skip_prk_steps") is False:
        name = type(scheduler).__name__
        raise BadInput(
            f"found {steps} steps for {name}",
            "at least 4",
            "give more --steps, or set its skip_prk_steps",
        )
