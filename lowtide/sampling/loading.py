"""Pipelines from a folder, a hub id or zoo:NAME, and the smallest pipeline around a bare module."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel
from torch import nn

from lowtide import zoo
from lowtide.errors import BadInput
from lowtide.models import ARCHITECTURES
from lowtide.sampling.pipelines import ClassConditionalPipeline, ModulePipeline


def as_pipeline(
    model: nn.Module, scheduler: Any = None, shape: tuple[int, ...] | None = None
) -> Any:
    """A pipeline around a bare denoiser."""
    if isinstance(model, UNet2DModel):
        kind = ClassConditionalPipeline if model.config.num_class_embeds else DDIMPipeline
        return kind(model, scheduler or DDIMScheduler())
    if type(model) in ARCHITECTURES or scheduler is None or shape is None:
        raise BadInput(
            f"found a bare {type(model).__name__}",
            "the pipeline it belongs to",
            "pass the pipeline (or scheduler and shape)",
        )
    return ModulePipeline(model, scheduler, shape)


def load_pipeline(source: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline from zoo:NAME, a local diffusers folder, or a hub id."""
    name, folder = str(source), local_folder(source)
    if folder and not (folder / "model_index.json").exists():
        return bare_model(folder, dtype)
    if not folder and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        raise BadInput(
            f"found no folder {name}",
            "a hub id, a local diffusers folder, or zoo:NAME",
            "check the path",
        )
    own = folder and class_name(folder / "model_index.json") == ClassConditionalPipeline.__name__
    return loaded(ClassConditionalPipeline if own else DiffusionPipeline, folder or name, dtype)


def local_folder(source: str | Path) -> Path | None:
    """Where the source lies on this machine, if it does."""
    name = str(source)
    folder = zoo.folder(name.removeprefix("zoo:")) if name.startswith("zoo:") else Path(name)
    return folder if folder.is_dir() else None


def bare_model(folder: Path, dtype: torch.dtype) -> Any:
    """A folder that holds one model and no pipeline."""
    kind = class_name(folder / "config.json")
    if kind is None:
        raise BadInput(
            f"found no model in {folder.name}",
            "model_index.json or config.json of diffusers",
            "check the path",
        )
    if kind != UNet2DModel.__name__:
        raise BadInput(
            f"found a bare {kind}",
            "a pipeline folder with model_index.json",
            "save the whole pipeline",
        )
    return as_pipeline(loaded(UNet2DModel, folder, dtype))


def class_name(config: Path) -> str | None:
    """The class that a config.json or a model_index.json names, if it is one of diffusers' kind."""
    try:
        fields = json.loads(config.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return fields.get("_class_name") if isinstance(fields, dict) else None


def loaded(kind: Any, source: Path | str, dtype: torch.dtype) -> Any:
    """from_pretrained, with what goes wrong said in one sentence."""
    try:
        return kind.from_pretrained(source, dtype=dtype)
    except BadInput:
        raise
    except Exception as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from error
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise BadInput(
            f"found {source} unreadable ({reason})",
            "a complete diffusers model",
            "copy or download it again",
        ) from error
