"""Float: an ordinary diffusers folder with the rounded weights, which needs no lowtide to load.

Float layers hold what the codes stand for. SmoothQuant's divisors and fused LoRAs are folded into
the weights. Inputs are not rounded any more, and what depends on the timestep alone is computed by
its float layers again.
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import nn

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.nn.correction import CORRECTION
from lowtide.nn.feature_cache import Cached
from lowtide.nn.float_layers import replace_module
from lowtide.nn.plan import Plan
from lowtide.nn.request_features import PerRequest
from lowtide.report.wording import counted
from lowtide.sampling.pipelines import Pipeline


def float_twin(model: nn.Module, plan: Plan, reference: nn.Module | None = None) -> nn.Module:
    """A copy of the packed denoiser in which every layer is a float one.

    `reference`: the float model, for layers that a checkpoint of one schedule no longer has.
    """
    twin = copy.deepcopy(model)
    twin._forward_pre_hooks.clear()
    if plan.corrected:
        delattr(twin, CORRECTION)
        twin._forward_hooks.clear()
    for name in (*plan.cached, *plan.blank, *plan.requests):
        replace_module(twin, name, _own_layer(twin, name) or _layer_of(reference, name))
    # diffusers keeps its quantizer on a model without declaring it.
    quantizer = cast(Any, twin).hf_quantizer
    quantizer.plan = replace(plan, cached={}, blank={}, requests={}, corrected=0)
    return cast(Any, twin).dequantize()


def _own_layer(twin: nn.Module, name: str) -> nn.Module | None:
    """The layer beside a table of features, where the checkpoint keeps one."""
    module = twin.get_submodule(name)
    if isinstance(module, Cached):
        return module.layer
    if isinstance(module, PerRequest):
        return module.exact or module.layer
    return None


def _layer_of(reference: nn.Module | None, name: str) -> nn.Module:
    if reference is None:
        raise BadInput(
            f"found a checkpoint of one schedule, which has tables in the place of {name}",
            "the float model, to take such layers from",
            "name it with --reference, or quantize without --only-schedule",
        )
    return copy.deepcopy(reference.get_submodule(name))


def losses(plan: Plan) -> list[str]:
    """What the float folder does not have, one sentence each."""
    rounded = sum(layer.input is not None for layer in plan.layers.values())
    each = ", each with a range for every timestep" if plan.per_step else ""
    lost = [f"Inputs of {counted(rounded, 'layer')} are not rounded{each}."] if rounded else []
    if plan.attentions:
        lost.append(f"The products of {counted(len(plan.attentions), 'attention')} are in float.")
    if tables := len(plan.cached) + len(plan.requests):
        features = counted(tables, "temporal layer")
        lost.append(f"Features of {features} are computed in float and come from no table.")
    if plan.corrected:
        lost.append("The mean error of the answer at each timestep is not subtracted.")
    return lost


def write(pipe: Pipeline, twin: nn.Module, folder: Path) -> None:
    """Write the pipeline with this denoiser as diffusers does."""
    copied = copy.copy(pipe)
    setattr(copied, sampling.denoiser_name(pipe), twin)
    with sampling.quiet_libraries():
        cast(DiffusionPipeline, copied).save_pretrained(folder)
