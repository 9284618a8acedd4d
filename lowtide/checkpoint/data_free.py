"""Quantize a float model while diffusers loads it, without any data.

The range of a weight is searched for the least error of the weight itself. Inputs are rounded by
their own range as the model runs: by token in a linear layer, by sample in a convolution.

The errors of a weight shift the mean of the answer, the same way in every step and image. Where a
layer reads a norm, the mean of its input is known roughly, and the bias takes the shift back. This
is the analytic bias correction of DFQ (Nagel et al., ICCV 2019, arXiv 1906.04721), with group norms
and SiLU in the place of batch norms and ReLU.
"""

import inspect
import warnings
from typing import cast

import torch
import torch.nn.functional as F
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.formats import OwnRange
from lowtide.models import ARCHITECTURES, Adapter, adapt
from lowtide.models.normed_inputs import NormedInput, normed_inputs
from lowtide.nn.float_layers import FloatLayer, float_layer, replace_module
from lowtide.nn.packed import packed_twin
from lowtide.nn.plan import LayerPlan, Plan, with_summary
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import plan_quantizers
from lowtide.sampling.drivers import Role
from lowtide.settings import Settings
from lowtide.stages.assign import (
    layer_plans,
    other_padding,
    other_parameters,
    uncalled,
    weight_format,
    with_own_range,
)
from lowtide.stages.fit_weights import fit_weight
from lowtide.stages.kept_layers import kept_in_float
from lowtide.stages.profiles import Bits

METHOD = "data-free"
POINTS = 40  # of the integral over a normal channel
OPTION = "modules_to_not_convert"
KEPT = f"kept in float ({OPTION})"
# Without a calibration, attention has no ranges.
ATTENTION = "q, k, v and softmax stay in float (data-free)"


def known_adapter(model: nn.Module) -> Adapter | None:
    """The adapter of a model, which may be without data; None if its class does not tell it."""
    if not any(kind in ARCHITECTURES for kind in type(model).__mro__):
        return None
    try:
        return adapt(model)
    except BadInput:
        return None  # a variant with other inputs; `_layer_plans` says what that costs


def data_free_plan(model: nn.Module, adapter: Adapter | None, settings: Settings) -> Plan:
    """The formats of a float model's layers; the model may be without data."""
    layers, left = _layer_plans(model, adapter, settings)
    kept = kept_in_float(settings.keep_float, layers, OPTION)
    plain = dict.fromkeys(kept, KEPT)
    layers = {
        name: with_own_range(plan, float_layer(model, name))
        for name, plan in layers.items()
        if name not in plain and plan.weight
    }
    left = {name: why for name, why in left.items() if name.removeprefix("input of ") not in plain}
    left |= plain | other_parameters(model)
    plan = with_summary(Plan(layers=layers, left=left, method=METHOD), settings)
    plan.summary.pop("steps")  # it samples with any number
    return plan


def _layer_plans(
    model: nn.Module, adapter: Adapter | None, settings: Settings
) -> tuple[dict[str, LayerPlan], dict[str, str]]:
    """The plan of each layer, and what stays in float and why."""
    if adapter is not None:
        bits = Bits(settings, Role(latents=False, prompted=False))
        layers, left = layer_plans(adapter, bits)
        unlike = other_padding(adapter.layers()) | uncalled(adapter)
        if adapter.attentions() and settings.inputs <= 8:
            left["attention"] = ATTENTION
    else:
        found = {name: each for name, each in model.named_modules() if isinstance(each, FloatLayer)}
        plan = LayerPlan(weight_format(settings.weights, settings.group), _inputs(settings))
        layers = dict.fromkeys(found, plan)
        left: dict[str, str] = {}
        unlike = other_padding(found) | read_by_others(model)
        warnings.warn(
            f"lowtide does not know {type(model).__name__}: its first and its last layer are "
            "quantized like the others. Name layers in modules_to_not_convert to keep them in "
            "float.",
            stacklevel=2,
        )
    return {name: each for name, each in layers.items() if name not in unlike}, left | unlike


def read_by_others(model: nn.Module) -> dict[str, str]:
    """Layers whose weights another module multiplies by itself, as poolings by attention do."""
    reason = "another module reads its weight"
    read: dict[str, str] = {}
    for name, module in model.named_modules():
        if "multi_head_attention_forward" in _source(type(module)):
            layers = (
                each for each, layer in module.named_modules() if isinstance(layer, FloatLayer)
            )
            read |= {f"{name}.{each}".removeprefix("."): reason for each in layers}
    return read


def _source(kind: type[nn.Module]) -> str:
    try:
        return inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return ""


def _inputs(settings: Settings) -> OwnRange | None:
    return OwnRange(settings.inputs) if settings.inputs <= 8 else None


class PackedAsLoaded:
    """A float model on the meta device, whose layers are packed as their weights arrive."""

    def __init__(self, model: nn.Module, plan: Plan, normed: dict[str, NormedInput]):
        self.model = model
        self.normed = normed
        # For layers that read a norm: how much the weights of each input channel changed.
        self.changes: dict[str, Tensor] = {}
        self.plan = plan
        self.inputs: dict[str, Quantizer] = plan_quantizers(model, plan)
        self.missing = set(plan.layers)

    def takes(self, name: str) -> bool:
        """Whether this is the weight of a layer that is still to be packed."""
        layer, _, leaf = name.rpartition(".")
        return leaf == "weight" and layer in self.missing

    @torch.no_grad()
    def pack(self, name: str, weight: Tensor) -> None:
        """Round a weight to nearest on the range of the least error, and pack its layer."""
        layer, _, _ = name.rpartition(".")
        if not weight.isfinite().all():
            raise BadInput(
                f"found NaN or infinity in {name}",
                "finite weights",
                "repair or download the model again",
            )
        plain = float_layer(self.model, layer)
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plan = self.plan.layers[layer]
        quantized = quantized_layer(plain, plan.weight, self.inputs[layer])
        fit_weight(quantized, "mse")
        if layer in self.normed:
            change = quantized.effective_weight().float() - weight.float()
            self.changes[layer] = change.flatten(2).sum(2) if change.dim() > 2 else change
        replace_module(self.model, layer, packed_twin(quantized))
        self.missing.discard(layer)

    @torch.no_grad()
    def finish(self) -> None:
        """Correct the biases, once every weight is there."""
        if self.missing:
            raise BadInput(
                f"found no weight of {min(self.missing)}",
                "a weight for each layer",
                "copy or download the whole model again",
            )
        for name, change in self.changes.items():
            bias = self.model.get_submodule(name).bias
            if isinstance(bias, Tensor):
                norm = self.model.get_submodule(self.normed[name].norm)
                bias -= (change @ _mean(norm, self.normed[name]).to(change.device)).to(bias.dtype)
        self.changes = {}


def _mean(norm: nn.Module, input: NormedInput) -> Tensor:
    """The mean of each channel, as if the norm made each of them normal: by Gauss-Hermite."""
    points, weights = (torch.tensor(each).float() for each in hermegauss(POINTS))
    gain, offset = (cast(Tensor, each).detach().float().cpu() for each in (norm.weight, norm.bias))
    values = torch.outer(gain, points) + offset.unsqueeze(1)
    values = F.silu(values) if input.activated else values
    return values @ (weights / weights.sum())


def packed_as_loaded(model: nn.Module, adapter: Adapter | None, plan: Plan) -> PackedAsLoaded:
    """Pack a model's layers as their weights arrive."""
    return PackedAsLoaded(model, plan, {} if adapter is None else normed_inputs(adapter))
