"""One run, from a model to a packed checkpoint: adapt, collect, assign, reconstruct, pack, save; then load and sample."""

import copy
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide import checkpoint, diffusers_hook, sample
from lowtide.errors import BadInput
from lowtide.methods import METHODS, PAPERS
from lowtide.models import adapt
from lowtide.nn.swap import find_clock
from lowtide.plan import Plan, Settings, settings_from
from lowtide.stages.base import Job, recipe_digest, run_recipe


@dataclass
class Quantized:
    """A pipeline with a packed denoiser, and what is known of how it got there."""

    pipe: Any
    plan: Plan
    report: dict[str, Any]

    @property
    def model(self) -> nn.Module:
        return sample.denoiser(self.pipe)

    def save(self, folder: str | Path) -> Path:
        """Write an ordinary diffusers folder, whole or not at all."""
        with checkpoint.written_beside(Path(folder)) as fresh:
            self.pipe.save_pretrained(fresh)
        return Path(folder)


def quantize(target: Any, *, method: str = "tfmq", folder: str | Path | None = None, **options: Any) -> Quantized:
    """Quantize a diffusers pipeline (or a bare UNet2DModel) in place and hand it back packed.

    `options` are the fields of lowtide.plan.Settings: weights, inputs, steps, prompts, labels, iters, ... With `folder`,
    finished units are kept there and an interrupted run goes on where it stopped, to the same bits.
    """
    settings = settings_from(options)
    if method not in METHODS:
        raise BadInput(f"found method {method!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`")
    pipe = sample.as_pipeline(target) if isinstance(target, nn.Module) else target
    model = sample.denoiser(pipe)
    check_model(model)
    recipe = METHODS[method](settings)
    digest = recipe_digest(recipe, settings, fingerprint(model))
    job = Job(pipe, model.eval(), adapt(model), settings, method, Path(folder) / digest if folder else None)
    run_recipe(recipe, job)
    return finish(job)


def finish(job: Job) -> Quantized:
    """The plan's summary, the hook into diffusers, and the report."""
    summary = {"weights": job.settings.weights, "inputs": job.settings.inputs, "profile": job.settings.profile}
    plan = replace(job.plan, summary=summary | {"timesteps": len(job.plan.timesteps), "layers": len(job.plan.layers)})
    if hasattr(job.model, "register_to_config"):
        diffusers_hook.attach(job.model, plan)
    job.report["account"] = checkpoint.account(job.model)
    job.report["float"] = plan.left
    return Quantized(job.pipe, plan, job.report)


def check_model(model: nn.Module) -> None:
    """A model that can be quantized: finite weights, and not quantized yet."""
    if getattr(model, "is_quantized", False):
        raise BadInput("found a model that is quantized already", "a float model", "load the original")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(f"found NaN or infinity in {name}", "finite weights", "repair or download the model again")


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {checkpoint.tensor_hash(tensor)}".encode())
    return digest.hexdigest()


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a saved folder."""
    return sample.load_pipeline(folder, dtype)
