"""Pipelines from a folder, a hub id or zoo:NAME, and the smallest pipeline around a bare module."""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from lowtide import zoo
from lowtide.errors import BadInput
from lowtide.machine.device_names import AUTO
from lowtide.machine.devices import CPU, chosen
from lowtide.models import ARCHITECTURES, Arguments
from lowtide.models.unet import config_of
from lowtide.sampling.drivers import check_forward, denoiser
from lowtide.sampling.pipelines import (
    OWN,
    ClassConditionalPipeline,
    ModulePipeline,
    Pipeline,
    Scheduler,
)
from lowtide.sampling.schedulers import around_unet

INDEX = "model_index.json"
# The entry of config.json that says which bare module a folder holds.
MODULE = "lowtide_module"
# The types of float weights by the name that a user gives.
DTYPES = {
    AUTO: torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def as_pipeline(
    target: DiffusionPipeline | Pipeline | nn.Module | str | Path,
    scheduler: Scheduler | None = None,
    shape: tuple[int, ...] | None = None,
    device: str = AUTO,
    dtype: str = AUTO,
    example: Arguments | None = None,
) -> Pipeline:
    """The pipeline that a user means: a name is loaded, a bare denoiser is wrapped.

    `scheduler`, and `shape` (of one sample) or `example` (the arguments of one call), are for a
    bare denoiser. `device` and `dtype` are for a name: a pipeline or a denoiser stays as its owner
    made it.
    """
    if not isinstance(target, nn.Module):
        _check_whole(target, scheduler, example)
    if isinstance(target, str | Path):
        return load_pipeline(target, DTYPES[dtype], chosen(device))
    pipe = (
        _wrapped(target, scheduler, shape, example)
        if isinstance(target, nn.Module)
        else cast(Pipeline, target)
    )
    if device != AUTO:
        _check_place(pipe, chosen(device))
    if dtype != AUTO:
        _check_dtype(pipe, dtype)
    return pipe


def _check_place(pipe: Pipeline, asked: torch.device) -> None:
    """A pipeline that its owner made lies on the device that is asked for."""
    found = next(denoiser(pipe).parameters()).device
    if found != asked:
        raise BadInput(
            f"found device {str(asked)!r} with a {type(pipe).__name__} on {found}",
            "a device for a model that is named by path",
            f"move the pipeline there with .to({str(asked)!r}), or leave device out",
        )


def _check_dtype(pipe: Pipeline, asked: str) -> None:
    """A pipeline that its owner made has the type of weights that is asked for."""
    found = str(next(denoiser(pipe).parameters()).dtype).removeprefix("torch.")
    if found != asked:
        raise BadInput(
            f"found dtype {asked!r} with a {type(pipe).__name__} in {found}",
            "a dtype for a model that is named by path",
            f"convert it with .to(torch.{asked}), or leave dtype out",
        )


def _check_whole(target: object, scheduler: Scheduler | None, example: Arguments | None) -> None:
    """A pipeline has its own scheduler and arguments."""
    given = "example" if example is not None else "a scheduler" if scheduler is not None else None
    if given:
        raise BadInput(
            f"found {given} with {target if isinstance(target, str) else type(target).__name__}",
            "a bare module, which has no pipeline",
            "leave it out, or set pipe.scheduler",
        )


def _wrapped(
    model: nn.Module,
    scheduler: Scheduler | None,
    shape: tuple[int, ...] | None,
    example: Arguments | None,
) -> Pipeline:
    """A pipeline around a bare denoiser."""
    if isinstance(model, UNet2DModel) and example is None and shape is None:
        if config_of(model).num_class_embeds:
            own = cast(Any, scheduler) or DDIMScheduler()
            return cast(Pipeline, ClassConditionalPipeline(model, own))
        return around_unet(model, scheduler or cast(Scheduler, DDIMScheduler()))
    is_listed = type(model) in ARCHITECTURES and example is None
    if is_listed or scheduler is None or (shape is None and example is None):
        raise BadInput(
            f"found a bare {type(model).__name__}",
            "the pipeline it belongs to, or a scheduler and an example",
            "pass the pipeline, or scheduler=DDIMScheduler() and "
            "example={'sample': ..., 'timestep': ...}",
        )
    check_forward(model)
    if shape is not None:
        return ModulePipeline(model, scheduler, shape)
    return _from_example(model, scheduler, cast(Arguments, example))


def _from_example(model: nn.Module, scheduler: Scheduler, example: Arguments) -> Pipeline:
    """The pipeline of a module that is called as in this example."""
    first, *_ = signature(model.forward).parameters
    tensors = {name: value for name, value in example.items() if isinstance(value, Tensor)}
    if len(tensors) < len(example) or first not in tensors or "timestep" not in tensors:
        raise BadInput(
            f"found an example with {', '.join(example) or 'nothing'} for a {type(model).__name__}",
            f"tensors by name: {first}, timestep, and what else its forward needs",
            f"give example={{{first!r}: ..., 'timestep': ...}}",
        )
    names = signature(model.forward).parameters
    if unknown := [name for name in tensors if name not in names]:
        raise BadInput(
            f"found {unknown[0]} in the example",
            f"some of {', '.join(names)}, which the forward takes",
            "check the spelling",
        )
    conditions = {name: tensors[name] for name in tensors if name not in (first, "timestep")}
    return ModulePipeline(model, scheduler, tuple(tensors[first].shape[1:]), conditions)


def module_facts(folder: Path) -> dict[str, Any] | None:
    """What a folder says of the bare module in it; None if it holds none."""
    try:
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return fields.get(MODULE) if isinstance(fields, dict) else None


def load_pipeline(
    source: str | Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Pipeline:
    """A pipeline from zoo:NAME, a local diffusers folder, or a hub id, on this device."""
    pipe = _loaded(source, dtype)
    if device != CPU:
        with quiet_libraries():
            cast(DiffusionPipeline, pipe).to(device)
    return pipe


def _loaded(source: str | Path, dtype: torch.dtype) -> Pipeline:
    folder = local_folder(source)
    if folder is None:
        return _hub_pipeline(str(source), dtype)
    if not (folder / INDEX).exists():
        return _bare_model(folder, dtype)
    return _from_pretrained(OWN.get(pipeline_class(folder), DiffusionPipeline), folder, dtype)


def local_folder(source: str | Path) -> Path | None:
    """The folder of the source on this machine, if it has one."""
    name = str(source)
    folder = zoo.folder(name.removeprefix("zoo:")) if name.startswith("zoo:") else Path(name)
    return folder if folder.is_dir() else None


def class_name(config: Path) -> str | None:
    """The class that a config.json or a model_index.json names, if it names one."""
    try:
        fields = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    name = fields.get("_class_name") if isinstance(fields, dict) else None
    return name if isinstance(name, str) else None


def pipeline_class(folder: Path) -> str:
    """The pipeline's class name in model_index.json, checked before anything is loaded."""
    name = class_name(folder / INDEX)
    if name is None:
        raise BadInput(
            f"found a {INDEX} in {folder.name} that names no pipeline",
            "JSON with a _class_name, as diffusers writes it",
            "copy or download the model again",
        )
    with quiet_libraries():
        known = name in OWN or hasattr(diffusers, name)
    if not known:
        raise BadInput(
            f"found the unknown pipeline {name} in the {INDEX} of {folder.name}",
            "a pipeline class of diffusers",
            "update diffusers, or choose another model",
        )
    return name


def _hub_pipeline(name: str, dtype: torch.dtype) -> Pipeline:
    """A pipeline from the hub; only its download shows a progress bar."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise BadInput(
            f"found no folder {name}",
            "a hub id, a local diffusers folder, or zoo:NAME",
            "check the path",
        )
    with quiet_libraries(progress_bars=True), _one_sentence(name):
        DiffusionPipeline.download(name)
    return _from_pretrained(DiffusionPipeline, name, dtype)


def _bare_model(folder: Path, dtype: torch.dtype) -> Pipeline:
    """A folder that holds one model and no pipeline."""
    kind = class_name(folder / "config.json")
    if module_facts(folder) is not None:
        raise BadInput(
            f"found a bare {kind}, which lowtide packed",
            "the code that makes it",
            f"load it with lowtide.load({str(folder)!r}, factory={kind})",
        )
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
    return as_pipeline(_from_pretrained(UNet2DModel, folder, dtype))


def _from_pretrained(kind: Any, source: Path | str, dtype: torch.dtype) -> Any:
    with quiet_libraries(), _one_sentence(source):
        return kind.from_pretrained(source, dtype=dtype)


@contextmanager
def _one_sentence(source: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while the source is read into one sentence."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:
        if isinstance(error.__cause__, BadInput):
            raise error.__cause__ from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"found {source} unreadable ({lines[0][:200]})",
            "a complete diffusers model",
            "copy or download it again",
        ) from error


@contextmanager
def quiet_libraries(*, progress_bars: bool = False) -> Iterator[None]:
    """Hide what diffusers and transformers print while they load and save: warnings, progress bars.

    Their settings are restored afterwards. `progress_bars`: show the bars all the same.
    """
    libraries = (diffusers_logging, transformers_logging)
    before = [(each, each.get_verbosity(), each.is_progress_bar_enabled()) for each in libraries]
    hub_was_quiet = are_progress_bars_disabled()
    try:
        for library in libraries:
            library.set_verbosity_error()
            if not progress_bars:
                library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=FutureWarning)
            yield
    finally:
        for library, verbosity, enabled in before:
            library.set_verbosity(verbosity)
            if enabled and not progress_bars:
                library.enable_progress_bar()
        # transformers switches the hub's bars together with its own.
        if hub_was_quiet:
            disable_progress_bars()
