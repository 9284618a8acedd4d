"""Convert: every tensor of a latent-diffusion checkpoint goes to exactly one place."""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lowtide import sampling
from lowtide.checkpoint import folders
from lowtide.errors import BadInput
from lowtide.sampling.class_embedder import ClassEmbedder
from lowtide.sampling.pipelines import ClassConditionalPipeline, UnconditionalPipeline
from lowtide.workflows.compvis import configs
from lowtide.workflows.compvis.configs import ModelConfig
from lowtide.workflows.compvis.names import (
    AUTOENCODER,
    CONDITION,
    EMA,
    UNET,
    UNUSED,
    autoencoder_names,
    ema_name,
    unknown,
)

Names = Callable[[str], tuple[str, ...]]
Splitter = Callable[[Tensor], tuple[Tensor, ...]]
# How far the noise schedule of the checkpoint may be from that of the config.
SCHEDULE = 1e-5


def convert_to_folder(
    checkpoint: str | Path, config: str | Path, out: str | Path, *, ema: bool = True
) -> dict[str, object]:
    """Convert, save, and say what was made."""
    with folders.written_beside(Path(out)) as fresh:
        pipe = converted(checkpoint, config, ema=ema)
        with sampling.quiet_libraries():
            pipe.save_pretrained(fresh)
    parts = {name: type(part).__name__ for name, part in pipe.components.items() if part}
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    parameters = sum(map(_size, modules))
    return {
        "folder": str(out),
        "pipeline": type(pipe).__name__,
        "parts": parts,
        "parameters": parameters,
        "ema": ema and _has_ema(_state(Path(checkpoint))),
    }


def _size(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())


def converted(
    checkpoint: str | Path, config: str | Path, *, ema: bool = True
) -> LDMPipeline | UnconditionalPipeline | ClassConditionalPipeline:
    """The pipeline of a checkpoint of latent-diffusion and its YAML.

    ema: take the moving average of the UNet's weights where there is one, as that code's samplers
    do.
    """
    model = configs.read_config(Path(config))
    state = _state(Path(checkpoint))
    _check_names(state)
    _check_schedule(state, model)
    unet = _unet(state, model, ema=ema)
    autoencoder = _autoencoder(state, model)
    scheduler = DDIMScheduler(**configs.scheduler_config(model))
    if model.classes is None:
        plain = cast(UNet2DModel, unet)
        if configs.head_width(model) is None:
            return UnconditionalPipeline(plain, scheduler, autoencoder, model.unet["num_heads"])
        return LDMPipeline(cast(VQModel, autoencoder), plain, scheduler)
    embedder = ClassEmbedder(model.classes, model.unet["context_dim"])
    table = {"embedding.weight": state[f"{CONDITION}embedding.weight"]}
    _fill(embedder, table)
    return ClassConditionalPipeline(
        unet, scheduler, vae=autoencoder, class_embedder=embedder, null_label=model.classes - 1
    )


def _state(path: Path) -> dict[str, Tensor]:
    """The tensors of a .ckpt or .safetensors file; no code in it is run."""
    expected = "a .ckpt or .safetensors file of latent-diffusion"
    if not path.is_file():
        raise BadInput(f"found no file {path}", expected, "check the path")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"found {path.name} unreadable without running code in it ({lines[0][:200]})",
            expected,
            "if you trust it, save its state_dict alone with torch.save, and convert that",
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadInput(f"found no tensors in {path.name}", expected, "check the file")
    return tensors


def _check_names(state: Mapping[str, Tensor]) -> None:
    """Every tensor belongs to a part that is converted, or is known not to be needed."""
    for name in state:
        is_part = name.startswith((UNET, AUTOENCODER)) or name == f"{CONDITION}embedding.weight"
        if not is_part and not UNUSED.fullmatch(name):
            raise unknown(name)


def _check_schedule(state: Mapping[str, Tensor], model: ModelConfig) -> None:
    """The noise schedule of the config is that of the checkpoint, where it has one."""
    saved = state.get("alphas_cumprod")
    if saved is None:
        return
    ours = DDIMScheduler(**configs.scheduler_config(model)).alphas_cumprod
    if saved.shape != ours.shape or float((saved - ours).abs().max()) > SCHEDULE:
        raise BadInput(
            "found another noise schedule in the checkpoint than in the config",
            "the config that the checkpoint was trained with",
            "check --config",
        )


def _has_ema(state: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(EMA) for name in state)


def _unet(state: Mapping[str, Tensor], model: ModelConfig, *, ema: bool) -> nn.Module:
    kind = UNet2DModel if model.classes is None else UNet2DConditionModel
    with sampling.quiet_libraries():
        unet = cast(Any, kind)(**configs.unet_config(model)).eval()
    tensors: dict[str, Tensor] = {}
    averaged = ema and _has_ema(state)
    for name in _parts(state, UNET):
        source = ema_name(name) if averaged else UNET + name
        if source not in state:
            raise BadInput(f"found no {source} in the checkpoint", "all averages", "give --no-ema")
        tensors[name] = state[source]
    splitter = _head_splitter(model)
    _fill(unet, _renamed(tensors, configs.unet_layout(model).names, splitter))
    return unet


def _autoencoder(state: Mapping[str, Tensor], model: ModelConfig) -> nn.Module:
    factor = state.get("scale_factor", torch.tensor(model.params.get("scale_factor", 1.0)))
    config = configs.autoencoder_config(model, float(factor))
    autoencoder = (VQModel if model.is_vq else AutoencoderKL)(**config).eval()
    tensors = {
        name: state[AUTOENCODER + name]
        for name in _parts(state, AUTOENCODER)
        if not UNUSED.fullmatch(AUTOENCODER + name)
    }
    _fill(autoencoder, _renamed(tensors, lambda name: autoencoder_names(name, model.levels)))
    return autoencoder


def _parts(state: Mapping[str, Tensor], prefix: str) -> list[str]:
    return [name.removeprefix(prefix) for name in state if name.startswith(prefix)]


def _renamed(
    tensors: Mapping[str, Tensor], names: Names, split: Splitter | None = None
) -> dict[str, Tensor]:
    """The tensors under their new names; two that get one name are an error."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = names(name)
        pieces = split(tensor) if split and len(new) == 3 else (tensor,)
        for place, piece in zip(new, pieces, strict=True):
            if place in renamed:
                raise BadInput(f"found two tensors for {place}", "one", "check --config")
            renamed[place] = piece
    return renamed


def _head_splitter(model: ModelConfig) -> Splitter:
    """Takes q, k and v out of a joint projection, whose rows are (heads, 3, width of a head)."""
    width = configs.head_width(model)

    def split(joint: Tensor) -> tuple[Tensor, ...]:
        heads = len(joint) // (3 * width) if width else model.unet["num_heads"]
        rows = joint.unflatten(0, (heads, 3, -1))
        return tuple(rows[:, part].flatten(0, 1).contiguous() for part in range(3))

    return split


def _fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors into a module, each into exactly one parameter; 1 x 1 convolutions as linear."""
    expected = module.state_dict()
    if difference := sorted(set(expected) ^ set(tensors)):
        kind = "missing" if difference[0] in expected else "left over"
        raise BadInput(
            f"found {len(difference)} tensors of the {type(module).__name__} that do not fit "
            f"(first: {difference[0]}, {kind})",
            "the tensors of the model that the config describes",
            "check --config",
        )
    fitted: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        is_kernel = tensor.dim() > expected[name].dim() and tensor[0, 0].numel() == 1
        fitted[name] = tensor.flatten(1) if is_kernel else tensor
        if fitted[name].shape != expected[name].shape:
            raise BadInput(
                f"found {name} with shape {tuple(tensor.shape)}",
                f"{tuple(expected[name].shape)}",
                "check --config",
            )
    module.load_state_dict(fitted)
