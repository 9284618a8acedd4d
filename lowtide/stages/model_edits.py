"""Edits of the model that papers share: split a layer, smooth its input, cache a temporal layer.

Each edit changes the model and the plan, so that a checkpoint's skeleton is edited the same way.
"""

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models import Unit, adapt
from lowtide.nn.correction import Correction, add_correction
from lowtide.nn.feature_cache import Cached
from lowtide.nn.plan import CachePlan, LayerPlan, RequestPlan
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.split import split_modules
from lowtide.nn.swap import find_clock, quantizers, replace_module
from lowtide.stages.base import Job


def split_layers(job: Job, splits: dict[str, int]) -> None:
    """Split float layers, by the input channels of the first half, before formats are assigned.

    The adapter then knows the halves as layers of their own.
    """
    if job.plan.layers:
        raise BadInput(
            "found a model whose formats are assigned already",
            "a float model to split layers of",
            "split before Assign",
        )
    split_modules(job.model, splits)
    job.plan = replace(job.plan, splits=job.plan.splits | splits)
    job.adapter = adapt(job.model, job.calls[0].arguments, job.adapter.architecture)


def range_each_step(job: Job, names: Collection[str] | None = None) -> None:
    """Give the inputs of these layers a range for each step, before any is fitted.

    names: None is every layer and every attention.
    """
    layers = dict(job.plan.layers)
    for name in layers if names is None else names:
        layers[name] = replace(layers[name], per_step=True)
    job.plan = replace(job.plan, layers=layers)
    if names is None:
        attentions: dict[str, dict[str, LayerPlan]] = {}
        for name, parts in job.plan.attentions.items():
            attentions[name] = {part: replace(plan, per_step=True) for part, plan in parts.items()}
        job.plan = replace(job.plan, attentions=attentions)
    if not job.plan.per_step:
        return
    find_clock(job.model).widen()
    inputs = None if names is None else {f"{name}.input" for name in names}
    for name, quantizer in quantizers(job.model).items():
        if inputs is None or name in inputs:
            quantizer.per_step = True


def smooth_layer(job: Job, name: str, divisors: Tensor) -> None:
    """Divide the layer's input channels by more divisors, and multiply its weights by them.

    divisors: (input channels,). Weight ranges and input ranges must be fitted after this.
    """
    layer = job.model.get_submodule(name)
    assert isinstance(layer, QuantizedLayer)
    layer.set_smooth(layer.divisors * divisors.to(layer.weight.device))
    job.plan.layers[name] = replace(job.plan.layers[name], smooth=True)


@torch.no_grad()
def fold_into_norm(job: Job, name: str, divisors: Tensor) -> bool:
    """Divide the weight and bias of the norm before a layer, and multiply the layer's weights.

    It needs a norm whose output no other layer reads; the answer says whether there is one.
    """
    norm_name = job.adapter.norm_before(name)
    if norm_name is None:
        return False
    layer = job.model.get_submodule(name)
    norm = job.model.get_submodule(norm_name)
    assert isinstance(layer, QuantizedLayer)
    assert isinstance(norm.weight, Tensor) and isinstance(norm.bias, Tensor)
    divisors = divisors.to(layer.weight)
    norm.weight.div_(divisors)
    norm.bias.div_(divisors)
    layer.weight.mul_(divisors.reshape(-1, *[1] * (layer.weight.dim() - 2)))
    return True


def cache_layer(job: Job, name: str, plan: CachePlan) -> Cached:
    """Put an empty cache in a temporal layer's place.

    Until packing, the layer stays inside the cache to answer in float.
    """
    cached = Cached(plan, find_clock(job.model), job.model.get_submodule(name))
    replace_module(job.model, name, cached)
    job.plan = replace(job.plan, cached=job.plan.cached | {name: plan})
    find_clock(job.model).keyed = True
    return cached


def answer_once(job: Job, unit: Unit) -> None:
    """From packing on, compute this unit's features once for all steps of a request."""
    request_features(job, dict.fromkeys(unit.features, RequestPlan(unit.reads)))


def request_features(job: Job, requests: dict[str, RequestPlan]) -> None:
    """From packing on, compute the features of these layers once for all steps of a request."""
    job.plan = replace(job.plan, requests=job.plan.requests | requests)
    find_clock(job.model).keyed = True


def blank_layer(job: Job, name: str) -> None:
    """Let packing replace this layer, whose answer nothing needs, by zeros of its width."""
    layer = job.adapter.all_layers[name]
    assert isinstance(layer, nn.Linear)
    job.plan = replace(job.plan, blank=job.plan.blank | {name: layer.out_features})


def leave_float(job: Job, name: str, reason: str) -> None:
    """Leave a layer in float, with the reason in the plan."""
    module = job.model.get_submodule(name)
    layer = module.layer if isinstance(module, Cached) else module
    if isinstance(layer, QuantizedLayer):
        layer.format = None
        layer.grid = None
        layer.input.format = None
    forget(job, name)
    job.plan.left[name] = reason


def forget(job: Job, name: str) -> None:
    """Remove from the plan what it says of this layer."""
    job.plan.layers.pop(name, None)
    job.plan.left.pop(name, None)
    job.plan.left.pop(f"input of {name}", None)


def correct_answer(job: Job, channels: int) -> Correction:
    """Attach a correction for the first `channels` channels of the denoiser's answer.

    It has no effect until its tables are set.
    """
    job.plan = replace(job.plan, corrected=channels)
    find_clock(job.model).keyed = True
    return add_correction(job.model, channels)
