"""Folders of bare modules: a packed module that diffusers cannot build, because its code is yours.

    config.json         the class of the module, and the shape of one sample
    model.safetensors   tensors and plan, as in file_format.py
    conditions.safetensors  the arguments of its calls besides sample and timestep, if there are any
    scheduler/          of diffusers

`load(folder, factory=MyDenoiser)` calls the factory for a float module, packs its layers as the
plan says, and fills them.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lowtide import runtime
from lowtide.checkpoint import diffusers_hook
from lowtide.checkpoint.file_format import (
    HASHES,
    PLAN,
    hashes_by_name,
    metadata,
    read_metadata,
    verify,
    verify_kinds,
    verify_names,
    verify_plan,
)
from lowtide.errors import BadInput
from lowtide.models import Adapter, adapt
from lowtide.models.trace import on_meta
from lowtide.nn.clock import find_clock
from lowtide.nn.extension import Extension
from lowtide.nn.plan import Plan
from lowtide.nn.request_cache import request_caches
from lowtide.nn.split import split_modules
from lowtide.nn.swap import skeleton
from lowtide.sampling.loading import MODULE, module_facts
from lowtide.sampling.pipelines import ModulePipeline, Scheduler

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
CONDITIONS = "conditions.safetensors"
SCHEDULER = "scheduler"
KEPT_IN_FLOAT32 = ("scale", "smooth", "lowtide_correction")

Factory = Callable[[], nn.Module]


def title_of(module: nn.Module) -> str:
    """The class of a module, with the name of its file."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def check_bare(pipe: ModulePipeline) -> None:
    """The scheduler can be saved and made again."""
    name = type(pipe.scheduler).__name__
    if not _is_of_diffusers(name):
        raise BadInput(
            f"found a {name}, which is no scheduler of diffusers",
            "one that can be saved",
            "keep `.model`, or sample with a scheduler of diffusers",
        )


def _is_of_diffusers(name: str) -> bool:
    return getattr(diffusers, name, None) is not None


def write_bare(pipe: ModulePipeline, plan: Plan, folder: Path) -> None:
    """Write the files of a bare module into a folder that exists."""
    check_bare(pipe)
    state = {name: each.contiguous() for name, each in pipe.unet.state_dict().items()}
    save_file(state, folder / WEIGHTS, metadata(plan, state) if plan.layers else None)
    conditions = {name: each.contiguous() for name, each in pipe.conditions.items()}
    if conditions:
        save_file(conditions, folder / CONDITIONS)
    facts = {"class": title_of(pipe.unet), "shape": list(pipe.shape)}
    text = json.dumps({"_class_name": type(pipe.unet).__name__, MODULE: facts}, indent=1)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
    cast(Any, pipe.scheduler).save_pretrained(folder / SCHEDULER)


def load_bare(folder: Path, factory: Factory, dtype: torch.dtype) -> ModulePipeline:
    """The packed module in a pipeline, as it was saved."""
    facts = module_facts(folder)
    if facts is None:
        raise BadInput(
            f"found no bare module in {folder.name}",
            "a folder that lowtide wrote of one",
            "leave factory out",
        )
    module = _made(factory, facts["class"])
    header = read_metadata(folder / WEIGHTS)
    verify_plan(header, folder / WEIGHTS)
    plan = Plan.from_json(header[PLAN])
    pipe = ModulePipeline(
        module, _scheduler(folder / SCHEDULER), tuple(facts["shape"]), _conditions(folder)
    )
    adapter = _float_adapter(pipe, plan)
    skeleton(module, plan)
    _give_adapter(module, adapter)
    state = load_file(folder / WEIGHTS)
    verify_names(module, list(state))
    verify_kinds(header, [folder / WEIGHTS])
    verify(state, hashes_by_name(list(state), header[HASHES]), header)
    module.load_state_dict(_cast(state.items(), dtype), assign=True)
    module.requires_grad_(requires_grad=False)
    module.eval()
    diffusers_hook.attach_bare(module, plan)
    runtime.fuse(module)
    return pipe


def bare_problems(folder: Path) -> list[str]:
    """What is wrong with the tensors of a bare module, without its code: a sentence, or nothing."""
    try:
        header = read_metadata(folder / WEIGHTS)
        verify_plan(header, folder / WEIGHTS)
        verify_kinds(header, [folder / WEIGHTS])
        state = load_file(folder / WEIGHTS)
        verify(state, hashes_by_name(list(state), header[HASHES]), header)
    except (BadInput, OSError, ValueError, KeyError, SafetensorError) as error:
        return [str(error).partition("\n")[0]]
    return []


def _made(factory: Factory, title: str) -> nn.Module:
    """The float module that the factory makes."""
    if isinstance(factory, nn.Module) or not callable(factory):
        raise BadInput(
            f"found factory {type(factory).__name__}",
            "what makes the module, such as its class",
            "give factory=MyDenoiser or factory=lambda: MyDenoiser(width=64)",
        )
    module = factory()
    if not isinstance(module, nn.Module) or title_of(module) != title:
        found = title_of(module) if isinstance(module, nn.Module) else type(module).__name__
        raise BadInput(
            f"found a factory that makes a {found}", f"a {title}", "give the factory of that class"
        )
    return module.eval()


def _float_adapter(pipe: ModulePipeline, plan: Plan) -> Adapter | None:
    """The adapter of the float module, where the plan has tables that it fills."""
    if not plan.cached and not plan.requests:
        return None
    twin = on_meta(pipe.unet)
    split_modules(twin, plan.splits)
    return adapt(twin, pipe.example(2))


def _give_adapter(module: nn.Module, adapter: Adapter | None) -> None:
    """A bare module has no configuration that its adapter could be made from later."""
    extension = find_clock(module).extension
    if adapter is not None and isinstance(extension, Extension):
        extension.adapter = adapter
    for cache in request_caches(module):
        assert adapter is not None, "a plan with requests has an adapter"
        cache.adapter = adapter


def _cast(state: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """The state with its float tensors in this type, but for what is always float32."""
    result: dict[str, Tensor] = {}
    for name, tensor in state:
        kept = any(part in name for part in KEPT_IN_FLOAT32) or not tensor.is_floating_point()
        result[name] = tensor if kept else tensor.to(dtype)
    return result


def _conditions(folder: Path) -> dict[str, Tensor]:
    path = folder / CONDITIONS
    return load_file(path) if path.exists() else {}


def _scheduler(folder: Path) -> Scheduler:
    try:
        name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
        kind: Any = getattr(diffusers, name)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise BadInput(
            f"found no scheduler in {folder}", "the files that lowtide wrote", "copy them again"
        ) from error
    return kind.from_pretrained(folder)
