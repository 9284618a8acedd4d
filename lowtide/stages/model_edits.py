"""Rewrites that papers share: a layer split in two, input channels divided, a temporal layer answered from a cache.

Each changes the model and says so in the plan, so that a checkpoint's skeleton is rewritten the same way.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.models import Unit, adapt
from lowtide.nn.correction import Correction, add_correction
from lowtide.nn.feature_cache import Cached
from lowtide.nn.plan import CachePlan
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.split import split_modules
from lowtide.nn.swap import find_clock, quantizers, replace_module
from lowtide.stages.base import Job


def split_layers(job: Job, splits: dict[str, int]) -> None:
    """Split float layers, before formats are assigned; the adapter then knows the halves as layers of their own."""
    if job.plan.layers:
        raise BadInput(
            "found formats assigned already",
            "a float model to split layers of",
            "split before Assign",
        )
    split_modules(job.model, splits)
    job.plan = replace(job.plan, splits=job.plan.splits | splits)
    job.adapter = adapt(job.model, job.calls[0].arguments)


def range_each_step(job: Job) -> None:
    """Give every input a range for each step, before any is fitted."""
    layers = {name: replace(layer, per_step=True) for name, layer in job.plan.layers.items()}
    attentions = {
        name: {part: replace(plan, per_step=True) for part, plan in parts.items()}
        for name, parts in job.plan.attentions.items()
    }
    job.plan = replace(job.plan, layers=layers, attentions=attentions)
    find_clock(job.model).widen()
    for quantizer in quantizers(job.model).values():
        quantizer.per_step = True


def smooth_layer(job: Job, name: str, divisors: Tensor) -> None:
    """Divide the layer's input channels, beside what divides them already, and multiply its weights.

    Weight ranges and input ranges must be fitted after this.
    """
    layer = job.model.get_submodule(name)
    layer.set_smooth(layer.divisors * divisors.to(layer.weight.device))
    job.plan.layers[name] = replace(job.plan.layers[name], smooth=True)


@torch.no_grad()
def fold_into_norm(job: Job, name: str, divisors: Tensor) -> bool:
    """Let the norm in front of a layer do the dividing, if there is one that nobody else listens to; says whether it could."""
    norm = job.adapter.norm_before(name)
    if norm is None:
        return False
    layer, tables = job.model.get_submodule(name), job.model.get_submodule(norm)
    divisors = divisors.to(layer.weight)
    tables.weight.div_(divisors)
    tables.bias.div_(divisors)
    layer.weight.mul_(divisors.reshape(-1, *[1] * (layer.weight.dim() - 2)))
    return True


def cache_layer(job: Job, name: str, plan: CachePlan) -> Cached:
    """Put a cache, still empty, in a temporal layer's place; until packing the layer stays inside, to answer as float."""
    cached = Cached(plan, find_clock(job.model), job.model.get_submodule(name))
    replace_module(job.model, name, cached)
    job.plan = replace(job.plan, cached=job.plan.cached | {name: plan})
    find_clock(job.model).keyed = True
    return cached


def answer_once(job: Job, unit: Unit) -> None:
    """Let this unit's features be computed once for all steps of a request, from packing on."""
    job.plan = replace(
        job.plan, requests=job.plan.requests | dict.fromkeys(unit.features, unit.reads)
    )
    find_clock(job.model).keyed = True


def blank_layer(job: Job, name: str) -> None:
    """This layer's answer is not needed any more: packing leaves nothing of it but the width."""
    job.plan = replace(
        job.plan, blank=job.plan.blank | {name: job.adapter.all_layers[name].out_features}
    )


def leave_float(job: Job, name: str, why: str) -> None:
    """Give up quantizing a layer, if it was not in float before; the plan says why."""
    module = job.model.get_submodule(name)
    layer = module.layer if isinstance(module, Cached) else module
    if isinstance(layer, QuantizedLayer):
        layer.format = layer.grid = layer.input.format = None
    forget(job, name)
    job.plan.left[name] = why


def forget(job: Job, name: str) -> None:
    """Nothing that the plan says of this layer holds any more."""
    job.plan.layers.pop(name, None)
    job.plan.left.pop(name, None)
    job.plan.left.pop(f"input of {name}", None)


def correct_answer(job: Job, channels: int) -> Correction:
    """Attach a correction, still without effect, for the first `channels` channels of the denoiser's answer."""
    job.plan = replace(job.plan, corrected=channels)
    find_clock(job.model).keyed = True
    return add_correction(job.model, channels)
