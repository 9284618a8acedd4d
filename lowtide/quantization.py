"""One run, from a model to a packed checkpoint: adapt, collect, assign, reconstruct, pack, save; then load and sample."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import diffusers_hook, file_format
from lowtide.checkpoint.facts import fingerprint, float_share, kernels
from lowtide.checkpoint.quantized_pipeline import Quantized
from lowtide.errors import BadInput
from lowtide.methods import recipe_of
from lowtide.models import adapt
from lowtide.nn.clock import CLOCK
from lowtide.nn.plan import summarised
from lowtide.nn.swap import packed_layers
from lowtide.settings import settings_from
from lowtide.stages.base import Job, recipe_digest, run_recipe


def quantize(
    target: Any,
    *,
    method: str = "best",
    folder: str | Path | None = None,
    without: Sequence[str] = (),
    **options: Any,
) -> Quantized:
    """Quantize a diffusers pipeline (or a bare UNet2DModel) in place and hand it back packed; a name is loaded first.

    `options` are the fields of lowtide.plan.Settings: weights, inputs, steps, prompts, labels, iters, ... With `folder`,
    finished units are kept there and an interrupted run goes on where it stopped, to the same bits. `without` leaves stages
    of the method's recipe out, by name, to see what each is worth; the option `stages` changes some, {"omq": {"plus": True}}.
    """
    settings = settings_from(options)
    recipe = recipe_of(method, settings, without)
    target = sampling.load_pipeline(target) if isinstance(target, str | Path) else target
    pipe = sampling.as_pipeline(target) if isinstance(target, nn.Module) else target
    model = sampling.denoiser(pipe)
    check_model(model)
    model.requires_grad_(False)
    mark = fingerprint(model)
    digest = recipe_digest(recipe, settings, mark)
    job = Job(
        pipe,
        model.eval(),
        adapt(model, sampling.example(pipe)),
        settings,
        method,
        Path(folder) / digest if folder else None,
    )
    job.report |= {"fingerprint": mark, "options": settings.stages}
    run_recipe(recipe, job)
    return finish(job)


def finish(job: Job) -> Quantized:
    """The plan's summary, the hook into diffusers, and the report."""
    plan = summarised(job.plan, job.settings)
    if hasattr(job.model, "register_to_config"):
        diffusers_hook.attach(job.model, plan)
    job.report["account"] = file_format.account(job.model)
    job.report["float"] = plan.left
    job.report["kernels"] = dict(Counter(kernels(job.model).values()))
    job.report["float_share"] = float_share(job)
    return Quantized(job.pipe, plan, job.report)


def check_model(model: nn.Module) -> None:
    """A model that can be quantized: finite weights, and not quantized yet."""
    if getattr(model, "is_quantized", False) or any(packed_layers(model)):
        raise BadInput(
            "found a model that is quantized already", "a float model", "load the original"
        )
    if hasattr(model, CLOCK):
        raise BadInput(
            "found a model that a quantization which failed left half-way",
            "a float model",
            "load the original again",
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise BadInput(
                f"found NaN or infinity in {name}",
                "finite weights",
                "repair or download the model again",
            )


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The pipeline of a saved folder."""
    return sampling.load_pipeline(folder, dtype)
