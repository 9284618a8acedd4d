"""Drivers: how each kind of pipeline is called for a request, and which fields it supports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from typing import Any

import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.models.unet import config_of, height_width
from lowtide.sampling.call_values import call_values
from lowtide.sampling.pipelines import (
    ClassConditionalPipeline,
    ModulePipeline,
    Pipeline,
    Scheduler,
)
from lowtide.sampling.request import masks_of, pictures_of, read_prompts
from lowtide.settings import Request

DENOISERS = ("unet", "transformer", "decoder", "prior")
DECODERS = ("vae", "vqvae", "movq", "vqgan")


def denoiser_name(pipe: Pipeline) -> str:
    """The name of the pipeline's component that is called at every step."""
    for name in DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise BadInput(
        f"found {type(pipe).__name__} without {' or '.join(DENOISERS)}",
        "a diffusion pipeline",
        "load another model",
    )


def denoiser(pipe: Pipeline) -> nn.Module:
    return getattr(pipe, denoiser_name(pipe))


def check_forward(model: nn.Module) -> None:
    """A denoiser reads its timestep under this name."""
    parameters = list(signature(model.forward).parameters)
    if "timestep" not in parameters:
        raise BadInput(
            f"found {type(model).__name__}, whose forward takes {', '.join(parameters[:3])}",
            "a denoiser called (sample, timestep, ...)",
            "quantize it without data: see LowtideConfig in docs/guides/diffusers.md",
        )


@dataclass(frozen=True)
class Role:
    """What a pipeline gives its denoiser and takes from it.

    latents: the samples are latents, which an autoencoder decodes.
    prompted: the denoiser reads a prompt.
    """

    latents: bool
    prompted: bool


def role_of(pipe: Pipeline) -> Role:
    """The role of the pipeline's denoiser."""
    decoders = (getattr(pipe, name, None) for name in DECODERS)
    latents = any(isinstance(each, nn.Module) for each in decoders)
    return Role(latents, prompted="prompts" in supported_fields(pipe))


@dataclass(frozen=True)
class Driver:
    """How a kind of pipeline is called.

    arguments: what the call gets for a request, besides steps, generators and the output type.
    fields: which of prompts, labels, guidance, size and pictures the pipeline supports.
    """

    arguments: Callable[[Pipeline, Request], dict[str, object]]
    fields: tuple[str, ...] = ()


def _unconditional(pipe: Pipeline, request: Request) -> dict[str, object]:
    dtype = next(denoiser(pipe).parameters()).dtype
    if not isinstance(pipe, ModulePipeline) and dtype == torch.bfloat16:
        reason = f"found a {type(pipe).__name__} in bfloat16, which diffusers cannot make images of"
        raise BadInput(reason, "float16 or float32", "convert it")
    return {"batch_size": len(request.seeds)}


def _known(pipe: Pipeline, name: str, value: object, option: str) -> dict[str, object]:
    """An argument of the pipeline's call; a pipeline that does not take it has no such option."""
    if value is None:
        return {}
    if name not in signature(pipe.__call__).parameters:
        raise BadInput(
            f"found {option} {value} for a {type(pipe).__name__}, whose call takes no {name}",
            "what the pipeline takes",
            f"leave --{option} away",
        )
    return {name: value}


def _guidance(pipe: Pipeline, request: Request) -> dict[str, object]:
    return _known(pipe, "guidance_scale", request.guidance, "guidance")


def _size(pipe: Pipeline, request: Request) -> dict[str, object]:
    height = _known(pipe, "height", request.size, "size")
    return height | _known(pipe, "width", request.size, "size")


def _labelled(pipe: Pipeline, request: Request) -> dict[str, object]:
    if not request.labels:
        raise BadInput(
            "found a class-conditional model and no labels",
            "the classes to draw",
            "give --labels, such as --labels 0-9",
        )
    return {"class_labels": request.by_seed(request.labels)} | _guidance(pipe, request)


def _prompted(pipe: Pipeline, request: Request) -> dict[str, object]:
    options = _guidance(pipe, request) | _size(pipe, request)
    if request.call.keys() & {"prompt", "prompt_embeds"}:
        return options
    prompts = request.prompts or read_prompts(None)
    return {"prompt": request.by_seed(prompts)} | options


def _embedded(pipe: Pipeline, request: Request) -> dict[str, object]:
    """Pipelines that read no text, but embeddings, which `call` holds."""
    return _guidance(pipe, request) | _size(pipe, request)


def _unbinned(pipe: Pipeline, request: Request) -> dict[str, object]:
    """Keep the request's size: some pipelines round a size to one of their own list."""
    known = signature(pipe.__call__).parameters
    binned = request.size is not None and "use_resolution_binning" in known
    binning = {"use_resolution_binning": False} if binned else {}
    return _prompted(pipe, request) | binning


def _with_pictures(pipe: Pipeline, request: Request) -> dict[str, object]:
    """Pipelines that start from a picture; strength 1, so that every step runs."""
    known = signature(pipe.__call__).parameters
    # The pictures of inpainting give the size; other pictures have it.
    drawn = "height" not in known and "image" not in request.call
    sized = replace(request, size=None) if drawn else request
    given = _prompted(pipe, sized) if "prompt" in known else _embedded(pipe, sized)
    if "strength" in known:
        given["strength"] = 1.0
    if "image" in request.call:
        return given
    is_needed = "strength" in known or known["image"].default is known["image"].empty
    if request.pictures is None and not is_needed:
        return given
    pictures = pictures_of(request, _side(pipe, request))
    given["image"] = pictures
    if "mask_image" in known:
        given["mask_image"] = masks_of(request, pictures)
    return given


def _side(pipe: Pipeline, request: Request) -> int:
    """Height and width of the pictures."""
    latents = height_width(config_of(denoiser(pipe)).sample_size)[0]
    return request.size or latents * getattr(pipe, "vae_scale_factor", 1)


UNCONDITIONAL = Driver(_unconditional)
LABELLED = Driver(_labelled, ("labels", "guidance"))
PROMPTED = Driver(_prompted, ("prompts", "guidance", "size"))
UNBINNED = Driver(_unbinned, PROMPTED.fields)
EMBEDDED = Driver(_embedded, ("guidance", "size"))
PICTURED = Driver(_with_pictures, (*PROMPTED.fields, "pictures"))

DRIVERS: dict[str, Driver] = {
    "DDPMPipeline": UNCONDITIONAL,
    "DDIMPipeline": UNCONDITIONAL,
    "LDMPipeline": UNCONDITIONAL,
    "UnconditionalPipeline": UNCONDITIONAL,
    "ModulePipeline": UNCONDITIONAL,
    "DiTPipeline": LABELLED,
    "ClassConditionalPipeline": LABELLED,
    "LDMTextToImagePipeline": PROMPTED,
    "StableDiffusionPipeline": PROMPTED,
    "StableDiffusionImg2ImgPipeline": PICTURED,
    "StableDiffusionInpaintPipeline": PICTURED,
    "StableDiffusionXLPipeline": PROMPTED,
    "StableDiffusionXLImg2ImgPipeline": PICTURED,
    "StableDiffusionXLInpaintPipeline": PICTURED,
    "PixArtAlphaPipeline": UNBINNED,
    "PixArtSigmaPipeline": UNBINNED,
    "StableDiffusion3Pipeline": PROMPTED,
    "FluxPipeline": PROMPTED,
}


# A pipeline of one's own is called by the first of these names that its `__call__` has.
_BY_PARAMETER = {
    "image": PICTURED,
    "prompt": UNBINNED,
    "image_embeds": EMBEDDED,
    "class_labels": LABELLED,
    "batch_size": UNCONDITIONAL,
}
# What every pipeline is called with.
_COMMON = ("num_inference_steps", "generator", "output_type")


def driver_of(pipe: Pipeline) -> Driver:
    """The driver of the pipeline's class, of a class that it inherits from, or of its call."""
    for kind in type(pipe).__mro__:
        if kind.__name__ in DRIVERS:
            return DRIVERS[kind.__name__]
    parameters = signature(pipe.__call__).parameters
    missing = [name for name in _COMMON if name not in parameters]
    found = next((name for name in _BY_PARAMETER if name in parameters), None)
    if missing or found is None:
        lacking = missing or [" or ".join(_BY_PARAMETER)]
        raise BadInput(
            f"found a {type(pipe).__name__} whose call takes no {lacking[0]}",
            f"one of {', '.join(DRIVERS)}, or a pipeline that is called as they are",
            f"give its __call__ the parameter {lacking[0]}",
        )
    return _BY_PARAMETER[found]


def call_arguments(pipe: Pipeline, request: Request) -> dict[str, Any]:
    """What the pipeline is called with for one batch."""
    driver = driver_of(pipe)
    _check_fields(pipe, request)
    _check_labels(pipe, request)
    check_steps(pipe.scheduler, request.steps)
    common: dict[str, object] = {
        "num_inference_steps": request.steps,
        "generator": [torch.Generator().manual_seed(seed) for seed in request.seeds],
        "output_type": "np",
    }
    given = common | driver.arguments(pipe, request) | _eta(pipe, request)
    given |= call_values(pipe, request)
    _check_complete(pipe, given)
    return given


def _check_complete(pipe: Pipeline, given: Mapping[str, object]) -> None:
    """Every argument without a default has a value."""
    parameters = signature(pipe.__call__).parameters.values()
    needed = (each.name for each in parameters if each.default is each.empty)
    kinds = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    missing = [
        name
        for name in needed
        if name not in given and signature(pipe.__call__).parameters[name].kind not in kinds
    ]
    if missing:
        raise BadInput(
            f"found no {missing[0]} for a {type(pipe).__name__}",
            "each argument that its call needs",
            f"give call={{{missing[0]!r}: ...}}, or --call FILE",
        )


def _eta(pipe: Pipeline, request: Request) -> dict[str, float]:
    """eta, if the request has one; the pipeline and its scheduler must both take it.

    Stable Diffusion ignores eta without a word if the scheduler does not take it.
    """
    if request.eta is None:
        return {}
    calls = (pipe.__call__, pipe.scheduler.step)
    if not all("eta" in signature(call).parameters for call in calls):
        names = f"a {type(pipe).__name__} with a {type(pipe.scheduler).__name__}"
        raise BadInput(
            f"found eta {request.eta:g} for {names}",
            "a pipeline and a scheduler that take it, such as DDIM's",
            "leave --eta away, or change the pipeline's scheduler",
        )
    return {"eta": request.eta}


def gives_latents(pipe: Pipeline) -> bool:
    """Whether the pipeline can stop before its decoder."""
    return "prompts" in supported_fields(pipe)


def supported_fields(pipe: Pipeline) -> tuple[str, ...]:
    """Which of prompts, labels, guidance, size and pictures this pipeline supports."""
    return driver_of(pipe).fields


def _check_fields(pipe: Pipeline, request: Request) -> None:
    """A request may set only fields that the pipeline supports."""
    kind = type(pipe).__name__
    fields = " and ".join(supported_fields(pipe)) or "nothing of the kind"
    for name in ("prompts", "labels", "guidance", "size", "pictures"):
        if name not in supported_fields(pipe) and getattr(request, name) not in (None, ()):
            expected = f"a pipeline that takes it; {kind} takes {fields}"
            raise BadInput(f"found {name} for a {kind}", expected, f"leave --{name} away")


def _check_labels(pipe: Pipeline, request: Request) -> None:
    """Labels must be classes of the model; a UNet that needs labels must get them."""
    config = getattr(denoiser(pipe), "config", {})
    classes = config.get("num_embeds_ada_norm") or config.get("num_class_embeds") or 0
    if isinstance(pipe, ClassConditionalPipeline):
        classes = pipe.classes
    wrong = [label for label in request.labels if not 0 <= label < classes]
    if classes and wrong:
        raise BadInput(
            f"found label {wrong[0]}",
            f"0 to {classes - 1}",
            "choose labels the model was trained on",
        )
    # Upscalers give the level of their noise as the label.
    is_upscaler = "noise_level" in signature(pipe.__call__).parameters
    if config.get("num_class_embeds") and driver_of(pipe) is not LABELLED and not is_upscaler:
        raise BadInput(
            f"found a class-conditional model in a {type(pipe).__name__}, which gives it no labels",
            "a pipeline that passes labels",
            "wrap it in a pipeline with class_labels",
        )


def check_steps(scheduler: Scheduler, steps: int) -> None:
    """At most as many steps as in training; PNDM needs four if it starts with Runge-Kutta steps."""
    config = getattr(scheduler, "config", {})
    most = config.get("num_train_timesteps", steps)
    if steps > most:
        raise BadInput(
            f"found {steps} steps",
            f"at most {most}, those of the model's training",
            "give fewer --steps",
        )
    if steps < 4 and config.get("skip_prk_steps") is False:
        raise BadInput(
            f"found {steps} steps for {type(scheduler).__name__}",
            "at least 4",
            "give more --steps, or set its skip_prk_steps",
        )
