"""Blueprint: a pipeline from its configuration files alone; its denoiser has shapes, no weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from lowtide import sampling
from lowtide.checkpoint import folders
from lowtide.errors import BadInput
from lowtide.models import ARCHITECTURES, Adapter, Arguments, adapt
from lowtide.models.unet import config_of
from lowtide.sampling.drivers import DECODERS, Role
from lowtide.sampling.pipelines import Scheduler
from lowtide.sampling.quadratic_ddim import QuadraticDDIMScheduler
from lowtide.settings import Settings

DENOISERS = ("unet", "transformer")
CONFIGS = ("*.json", "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json")
# Tokens of the text encoders' answer, where it is not the length of one CLIP tokenizer.
TEXT = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "FluxPipeline": 512}
T5_BESIDE_CLIP = 256
CLIP_TOKENS = 77
FLUX_SIDE = 64  # tokens along each side of Flux's image where no size is set


@dataclass(frozen=True)
class Blueprint:
    """A pipeline without weights.

    model: the denoiser on the meta device.
    others: bytes in float32 of each other component.
    text: tokens of the text that the denoiser reads.
    scale: pixels along one side of a latent value.
    null_label: the class that means "no class", if the model has one.
    latents: whether an autoencoder decodes the samples.
    """

    name: str
    pipeline: str
    model: nn.Module
    scheduler: Scheduler
    others: dict[str, int]
    text: int = CLIP_TOKENS
    scale: int = 8
    null_label: int | None = None
    latents: bool = False

    @property
    def role(self) -> Role:
        fields = sampling.DRIVERS[self.pipeline].fields
        return Role(self.latents, prompted="prompts" in fields)

    def adapter(self, settings: Settings) -> Adapter:
        """The adapter for the image size of the calibration."""
        return adapt(self.model, self.example(settings))

    def example(self, settings: Settings) -> Arguments:
        """The inputs of one call, as this pipeline makes them."""
        with torch.device("meta"):
            example = ARCHITECTURES[type(self.model)].example(self.model, 2)
        inputs: Arguments = {
            name: value for name, value in example.items() if isinstance(value, Tensor | dict)
        }
        if "encoder_hidden_states" in inputs:
            inputs |= _with_text_length(inputs, self.text)
        first = next(iter(inputs))
        if self.pipeline == "FluxPipeline":
            side = settings.size // (2 * self.scale) if settings.size else FLUX_SIDE
            return inputs | _flux_tokens(inputs, side * side)
        if settings.size:
            side = settings.size // self.scale
            inputs[first] = inputs[first].new_empty(*inputs[first].shape[:2], side, side)
        return inputs

    def branches(self, settings: Settings) -> int:
        """Samples of a call that belong to one image: two with classifier-free guidance."""
        if self.pipeline == "ClassConditionalPipeline":
            return 1 if self.null_label is None or settings.guidance == 1 else 2
        if self.pipeline == "UnconditionalPipeline":
            return 1
        parameters = signature(getattr(diffusers, self.pipeline).__call__).parameters
        # Flux and distilled UNets read the guidance as an input.
        distilled = config_of(self.model).get("time_cond_proj_dim")
        if "guidance_scale" not in parameters or self.pipeline == "FluxPipeline" or distilled:
            return 1
        default = parameters["guidance_scale"].default
        called = settings.call.get("guidance_scale", default)
        given = called if isinstance(called, int | float) else default
        guidance = given if settings.guidance is None else settings.guidance
        return 2 if guidance > 1 else 1

    def timesteps(self, settings: Settings) -> list[float]:
        """The timestep of every call of the denoiser for one image, in the scheduler's units."""
        scheduler = self.scheduler
        if settings.scheduler or settings.spacing:
            scheduler = sampling.scheduler_like(scheduler, settings.scheduler, settings.spacing)
        sampling.check_steps(scheduler, settings.steps)
        shifted = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(settings.steps, **shifted)
        return [float(each) for each in scheduler.timesteps]


def _with_text_length(inputs: Arguments, tokens: int) -> dict[str, Tensor]:
    """The text, and its mask, with that many tokens."""
    text = inputs["encoder_hidden_states"]
    resized = {"encoder_hidden_states": text.new_empty(text.shape[0], tokens, text.shape[2])}
    if "encoder_attention_mask" in inputs:
        mask = inputs["encoder_attention_mask"]
        resized["encoder_attention_mask"] = mask.new_empty(text.shape[0], tokens)
    if "txt_ids" in inputs:
        resized["txt_ids"] = inputs["txt_ids"].new_empty(tokens, 3)
    return resized


def _flux_tokens(inputs: Arguments, tokens: int) -> dict[str, Tensor]:
    """The image with that many tokens."""
    image = inputs["hidden_states"]
    return {
        "hidden_states": image.new_empty(image.shape[0], tokens, image.shape[2]),
        "img_ids": inputs["img_ids"].new_empty(tokens, 3),
    }


def read(source: str, dtype: torch.dtype = torch.float32) -> Blueprint:
    """The blueprint of a local folder, zoo:NAME, or a hub id, whose configuration is fetched.

    dtype: of the denoiser's weights.
    """
    blueprint = _read(source)
    with sampling.quiet_libraries():
        return replace(blueprint, model=blueprint.model.to(dtype))


def _read(source: str) -> Blueprint:
    folders.recover_missing(source)
    folder = sampling.local_folder(source) or _fetched(source)
    if not (folder / "model_index.json").exists():
        return _bare(source, folder)
    pipeline = sampling.pipeline_class(folder)
    index = json.loads((folder / "model_index.json").read_text())
    parts = _parts(index)
    home = next((name for name in DENOISERS if name in parts), None)
    if home is None or pipeline not in sampling.DRIVERS:
        raise BadInput(
            f"found {pipeline}", f"one of {', '.join(sampling.DRIVERS)}", "choose another model"
        )
    sizes = {name: _float_bytes(folder / name, parts[name]) for name in parts if name != home}
    scheduler: Any = getattr(diffusers, parts["scheduler"][1], QuadraticDDIMScheduler)
    return Blueprint(
        name=source,
        pipeline=pipeline,
        model=_denoiser(folder / home),
        scheduler=scheduler.from_pretrained(folder / "scheduler"),
        others={name: size for name, size in sizes.items() if size},
        text=_text_tokens(folder, pipeline),
        scale=_latent_scale(folder),
        null_label=index.get("null_label"),
        latents=any(name in parts for name in DECODERS),
    )


def _parts(index: Mapping[str, object]) -> dict[str, tuple[str, str]]:
    """Library and class of each component in a model_index.json."""
    parts: dict[str, tuple[str, str]] = {}
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and value[1]:
            parts[name] = (value[0], value[1])
    return parts


def _bare(source: str, folder: Path) -> Blueprint:
    """A folder with one unconditional UNet and no pipeline around it."""
    name = sampling.class_name(folder / "config.json")
    if name is None:
        raise BadInput(
            f"found no model in {folder.name}",
            "model_index.json or config.json of diffusers",
            "check the path",
        )
    if name != UNet2DModel.__name__:
        raise BadInput(
            f"found a bare {name}",
            "a pipeline folder with model_index.json",
            "save the whole pipeline",
        )
    model = _denoiser(folder)
    labelled = config_of(model).num_class_embeds
    pipeline = "ClassConditionalPipeline" if labelled else "DDIMPipeline"
    return Blueprint(source, pipeline, model, DDIMScheduler(), others={}, scale=1)


def _fetched(source: str) -> Path:
    """The folder with the configuration files of a hub id, which are fetched."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(
            f"found no folder {source}",
            "a hub id, a local diffusers folder, or zoo:NAME",
            "check the path",
        )
    try:
        files = {"allow_patterns": list(CONFIGS), "ignore_patterns": ["*.index.json"]}
        return Path(snapshot_download(source, **files))
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise BadInput(
            f"found {source} unreadable ({reason})",
            "a diffusers model on the hub",
            "check its name and the connection, or name a local folder",
        ) from error


def _denoiser(folder: Path) -> nn.Module:
    """The float denoiser of a config.json, on the meta device."""
    kinds: dict[str | None, Any] = {kind.__name__: kind for kind in ARCHITECTURES}
    name = sampling.class_name(folder / "config.json")
    if name not in kinds:
        raise BadInput(
            f"found {name or 'no model'} in {folder.name}",
            f"one of {', '.join(kind.__name__ for kind in ARCHITECTURES)}",
            "choose another model",
        )
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise BadInput(
            "found a model that is quantized already", "a float model", "load the original"
        )
    with sampling.quiet_libraries(), torch.device("meta"):
        return kinds[name].from_config(config).eval()


def _float_bytes(folder: Path, part: tuple[str, str]) -> int:
    """Bytes in float32 of a component; 0 if it is no model, or its library is not known here."""
    library, name = part
    libraries = {"diffusers": diffusers, "transformers": transformers}
    kind: Any = getattr(libraries.get(library), name, None)
    if not _is_module(kind) or not (folder / "config.json").exists():
        return 0
    with sampling.quiet_libraries(), torch.device("meta"):
        if library == "diffusers":
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder))
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def _is_module(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, nn.Module)


def _text_tokens(folder: Path, pipeline: str) -> int:
    """Tokens of the text that the denoiser reads."""
    if pipeline in TEXT:
        return TEXT[pipeline]
    path = folder / "tokenizer" / "tokenizer_config.json"
    clip = CLIP_TOKENS
    if path.exists():
        clip = json.loads(path.read_text()).get("model_max_length", CLIP_TOKENS)
    return clip + (T5_BESIDE_CLIP if pipeline == "StableDiffusion3Pipeline" else 0)


def _latent_scale(folder: Path) -> int:
    """Pixels along one side of a latent value; 1 without a VAE."""
    paths = [folder / name / "config.json" for name in DECODERS]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return 1
    return 2 ** (len(json.loads(path.read_text())["block_out_channels"]) - 1)
