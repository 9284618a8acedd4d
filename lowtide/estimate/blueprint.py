"""Blueprint: a pipeline known from its configuration files alone; the denoiser has shapes and no weights."""

import json
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.models import ARCHITECTURES, Adapter, adapt
from lowtide.settings import Settings

DENOISERS = ("unet", "transformer")
CONFIGS = ("*.json", "*/config.json", "*/scheduler_config.json", "*/tokenizer_config.json")
# How many tokens the text encoders' answer has where it is not one CLIP tokenizer's length.
TEXT = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300, "FluxPipeline": 512}
T5_BESIDE_CLIP = 256
CLIP_TOKENS = 77
FLUX_SIDE = 64  # tokens along each side of the picture Flux draws when nobody says how large


@dataclass(frozen=True)
class Blueprint:
    """The denoiser on the meta device, the scheduler, and what else the pipeline holds: bytes in float32 by component."""

    name: str
    pipeline: str
    model: nn.Module
    scheduler: Any
    others: dict[str, int]
    text: int = CLIP_TOKENS
    scale: int = 8
    null_label: int | None = None

    def adapter(self, settings: Settings) -> Adapter:
        """The adapter at the size that calibration will run at."""
        return adapt(self.model, self.example(settings))

    def example(self, settings: Settings) -> dict[str, Any]:
        """One call's inputs as this pipeline makes them."""
        with torch.device("meta"):
            inputs = ARCHITECTURES[type(self.model)].example(self.model, 2)
        inputs = {name: value for name, value in inputs.items() if isinstance(value, Tensor | dict)}
        if "encoder_hidden_states" in inputs:
            inputs |= lengthened(inputs, self.text)
        first = next(iter(inputs))
        if self.pipeline == "FluxPipeline":
            side = settings.size // (2 * self.scale) if settings.size else FLUX_SIDE
            return inputs | flux_tokens(inputs, side * side)
        if settings.size:
            side = settings.size // self.scale
            inputs[first] = inputs[first].new_empty(*inputs[first].shape[:2], side, side)
        return inputs

    def branches(self, settings: Settings) -> int:
        """How many samples of a call belong to one image: two with classifier-free guidance."""
        if self.pipeline == "ClassConditionalPipeline":
            return 1 if self.null_label is None or settings.guidance == 1 else 2
        asked = signature(getattr(diffusers, self.pipeline).__call__).parameters.get(
            "guidance_scale"
        )
        # Flux and distilled UNets are told the guidance as an input.
        if (
            asked is None
            or self.pipeline == "FluxPipeline"
            or self.model.config.get("time_cond_proj_dim")
        ):
            return 1
        return 2 if (asked.default if settings.guidance is None else settings.guidance) > 1 else 1

    def timesteps(self, settings: Settings) -> list[float]:
        """The timestep of every call of the denoiser for one image, as the scheduler counts them."""
        sampling.check_steps(self.scheduler, settings.steps)
        shifted = {"mu": 1.0} if self.scheduler.config.get("use_dynamic_shifting") else {}
        self.scheduler.set_timesteps(settings.steps, **shifted)
        return [float(each) for each in self.scheduler.timesteps]


def lengthened(inputs: dict[str, Any], tokens: int) -> dict[str, Tensor]:
    """The text, and its mask, with that many tokens."""
    text = inputs["encoder_hidden_states"]
    changed = {"encoder_hidden_states": text.new_empty(text.shape[0], tokens, text.shape[2])}
    if "encoder_attention_mask" in inputs:
        changed["encoder_attention_mask"] = inputs["encoder_attention_mask"].new_empty(
            text.shape[0], tokens
        )
    if "txt_ids" in inputs:
        changed["txt_ids"] = inputs["txt_ids"].new_empty(tokens, 3)
    return changed


def flux_tokens(inputs: dict[str, Any], tokens: int) -> dict[str, Tensor]:
    picture = inputs["hidden_states"]
    return {
        "hidden_states": picture.new_empty(picture.shape[0], tokens, picture.shape[2]),
        "img_ids": inputs["img_ids"].new_empty(tokens, 3),
    }


def read(source: str) -> Blueprint:
    """The blueprint of a hub id (only its configuration is fetched), a local diffusers folder, or zoo:NAME."""
    folder = sampling.local_folder(source) or fetched(source)
    if not (folder / "model_index.json").exists():
        return bare(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    home = next(
        (name for name in DENOISERS if isinstance(index.get(name), list) and index[name][1]), None
    )
    if home is None or index["_class_name"] not in sampling.DRIVERS:
        raise BadInput(
            f"found {index['_class_name']}",
            f"one of {', '.join(sampling.DRIVERS)}",
            "choose another model",
        )
    parts = {
        name: tuple(value)
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1]
    }
    found = Blueprint(
        name=source,
        pipeline=index["_class_name"],
        model=denoiser(folder / home),
        scheduler=getattr(diffusers, parts["scheduler"][1]).from_pretrained(folder / "scheduler"),
        others={
            name: count
            for name, part in parts.items()
            if name != home and (count := float_bytes(folder / name, part))
        },
        null_label=index.get("null_label"),
    )
    return replace(
        found, text=text_tokens(folder, parts, found.pipeline), scale=latent_scale(folder)
    )


def bare(source: str, folder: Path) -> Blueprint:
    """A folder with one unconditional UNet and no pipeline around it."""
    kind = sampling.class_name(folder / "config.json")
    if kind is None:
        raise BadInput(
            f"found no model in {folder.name}",
            "model_index.json or config.json of diffusers",
            "check the path",
        )
    if kind != diffusers.UNet2DModel.__name__:
        raise BadInput(
            f"found a bare {kind}",
            "a pipeline folder with model_index.json",
            "save the whole pipeline",
        )
    model = denoiser(folder)
    kind = "ClassConditionalPipeline" if model.config.num_class_embeds else "DDIMPipeline"
    return Blueprint(source, kind, model, diffusers.DDIMScheduler(), {}, scale=1)


def fetched(source: str) -> Path:
    """Where the configuration files of a hub id lie, once they are here."""
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise BadInput(
            f"found no folder {source}",
            "a hub id, a local diffusers folder, or zoo:NAME",
            "check the path",
        )
    try:
        return Path(
            snapshot_download(
                source, allow_patterns=list(CONFIGS), ignore_patterns=["*.index.json"]
            )
        )
    except Exception as error:
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        wayout = "check its name and the connection, or name a local folder"
        raise BadInput(
            f"found {source} unreadable ({reason})", "a diffusers model on the hub", wayout
        ) from error


def denoiser(folder: Path) -> nn.Module:
    """The float denoiser of a config.json, on the meta device."""
    kinds = {kind.__name__: kind for kind in ARCHITECTURES}
    name = sampling.class_name(folder / "config.json")
    if name not in kinds:
        raise BadInput(
            f"found {name or 'no model'} in {folder.name}",
            f"one of {', '.join(kinds)}",
            "choose another model",
        )
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config:
        raise BadInput(
            "found a model that is quantized already", "a float model", "load the original"
        )
    with torch.device("meta"):
        return kinds[name].from_config(config).eval()


def float_bytes(folder: Path, part: tuple[str, str]) -> int:
    """Bytes of one other component, as float32; 0 for what is no model, or of a library we do not know."""
    library, name = part
    kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
    if not (
        isinstance(kind, type) and issubclass(kind, nn.Module) and (folder / "config.json").exists()
    ):
        return 0
    with torch.device("meta"):
        if library == "diffusers":
            model = kind.from_config(kind.load_config(folder))
        else:
            model = kind(kind.config_class.from_pretrained(folder))
    return 4 * sum(parameter.numel() for parameter in model.parameters())


def text_tokens(folder: Path, parts: dict[str, tuple], pipeline: str) -> int:
    """How many tokens of text the denoiser reads."""
    if pipeline in TEXT:
        return TEXT[pipeline]
    path = folder / "tokenizer" / "tokenizer_config.json"
    clip = (
        json.loads(path.read_text()).get("model_max_length", CLIP_TOKENS)
        if path.exists()
        else CLIP_TOKENS
    )
    return clip + (T5_BESIDE_CLIP if pipeline == "StableDiffusion3Pipeline" else 0)


def latent_scale(folder: Path) -> int:
    """Pixels along one side of a latent value."""
    path = folder / "vae" / "config.json"
    return (
        2 ** (len(json.loads(path.read_text())["block_out_channels"]) - 1) if path.exists() else 1
    )
