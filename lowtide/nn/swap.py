"""Replace the layers of a model by quantized or packed ones, as a plan says, and list them."""

from collections.abc import Iterator
from inspect import signature

import torch
from torch import nn

from lowtide.nn.attention import QuantAttention, attention_block, set_rounded
from lowtide.nn.clock import CLOCK, Clock, find_clock
from lowtide.nn.correction import add_correction
from lowtide.nn.extension import accept_new_timesteps
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.float_layers import (
    FloatLayer,
    bias_of,
    conv_options,
    float_layer,
    linear_options,
    replace_module,
)
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_layer, packed_twin
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantConv2d, QuantLinear, quantized_layer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_cache import add_request_cache
from lowtide.nn.request_features import PerRequest
from lowtide.nn.side_branch import add_branches
from lowtide.nn.split import split_modules

TIMESTEP = "timestep"
QuantLayer = QuantLinear | QuantConv2d
PackedLayer = PackedLinear | PackedConv2d


class _Quantizers:
    """Makes quantizers, each with the next row of the clock's table, in the order of the plan."""

    def __init__(self, root: nn.Module, plan: Plan):
        quantized = [each for each in plan.all_plans() if each.has_range]
        self.clock = Clock(
            plan.timesteps,
            plan.ticks,
            rows=len(quantized),
            per_step=any(each.per_step for each in quantized),
            keyed=plan.keyed,
            times=plan.times,
        )
        self.rows = 0
        # A root on meta, which has shapes alone, still needs the numbers of its clock, and a clock
        # on meta waits for a checkpoint.
        device = next(root.parameters()).device
        if "meta" not in (device.type, self.clock.timesteps.device.type):
            self.clock.to(device)
        if plan.keyed or TIMESTEP in signature(root.forward).parameters:
            self.clock.attach(root)
        root.add_module(CLOCK, self.clock)

    def make(self, plan: LayerPlan) -> Quantizer:
        row = self.rows
        self.rows += plan.has_range
        return Quantizer(plan.input, self.clock, row, per_step=plan.per_step)


def plan_quantizers(root: nn.Module, plan: Plan) -> dict[str, Quantizer]:
    """Add the plan's clock to a float model, and make the quantizer of each layer's input."""
    inputs = _Quantizers(root, plan)
    return {name: inputs.make(layer) for name, layer in plan.layers.items()}


def quantize_modules(root: nn.Module, plan: Plan) -> None:
    """Replace layers and attention by simulated ones; nothing is rounded until they have grids."""
    inputs = _Quantizers(root, plan)
    for name, layer in plan.layers.items():
        module = quantized_layer(float_layer(root, name), layer.weight, inputs.make(layer))
        replace_module(root, name, module)
    _add_attention(root, plan, inputs)


def _add_attention(root: nn.Module, plan: Plan, inputs: _Quantizers) -> None:
    for name, parts in plan.attentions.items():
        block = attention_block(root, name)
        quantizers = {part: inputs.make(layer) for part, layer in parts.items()}
        set_rounded(block, quantizers)


def skeleton(root: nn.Module, plan: Plan) -> None:
    """Replace layers by empty packed ones, which a checkpoint then fills."""
    split_modules(root, plan.splits)
    inputs = _Quantizers(root, plan)
    for name, layer in plan.layers.items():
        replace_module(root, name, _empty_layer(float_layer(root, name), layer, inputs.make(layer)))
    _add_attention(root, plan, inputs)
    for name, cache in plan.cached.items():
        layer = root.get_submodule(name) if cache.computed or cache.kept else None
        replace_module(root, name, Cached(cache, inputs.clock, layer))
    for name, width in plan.blank.items():
        replace_module(root, name, ZeroFeatures(width))
    if plan.corrected:
        add_correction(root, plan.corrected)
    if plan.requests:
        add_request_cache(root, plan)
    accept_new_timesteps(root, plan)
    add_branches(root, plan.sides)
    _enable_inputs(root)


def _empty_layer(module: FloatLayer, plan: LayerPlan, inputs: Quantizer) -> nn.Module:
    """The layer of the plan, without its data."""
    if plan.weight is not None:
        return packed_layer(module, plan.weight, inputs, smooth=plan.smooth)
    layer = quantized_layer(module, None, inputs)
    if plan.smooth:
        layer.set_smooth(torch.empty(module.weight.shape[1]))
    return layer


def pack_modules(root: nn.Module) -> None:
    """Replace quantized layers by packed ones, and layers with nothing quantized by float ones."""
    for name, layer in dict(quant_layers(root)).items():
        if layer.format is not None:
            replace_module(root, name, packed_twin(layer))
        elif layer.input.format is None:
            replace_module(root, name, plain_layer(layer))
    _enable_inputs(root)


def plain_layer(layer: QuantLayer) -> FloatLayer:
    """The float layer with the same parameters."""
    plain = (
        nn.Conv2d(**conv_options(layer))
        if isinstance(layer, nn.Conv2d)
        else nn.Linear(**linear_options(layer))
    )
    plain.weight = layer.weight
    plain.register_parameter("bias", bias_of(layer))
    return plain.train(layer.training)


def _enable_inputs(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, Quantizer):
            module.enabled = True
        elif isinstance(module, QuantAttention):
            module.active = True


def quant_layers(root: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    for name, module in root.named_modules():
        if isinstance(module, QuantLayer):
            yield name, module


def packed_layers(root: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    for name, module in root.named_modules():
        if isinstance(module, PackedLayer):
            yield name, module


def set_precision(root: nn.Module, precision: Precision) -> None:
    """Run every quantized part of `root` in this precision."""
    for module in root.modules():
        if isinstance(module, QuantLayer | QuantAttention | Cached | PerRequest):
            module.set_precision(precision)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers that have a range in the clock's table, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Quantizer) and module.has_range
    }


def drop_unused_rows(model: nn.Module) -> None:
    """Remove unused rows of the table of ranges, so that a skeleton of the plan has the same rows.

    The order of the rows stays.
    """
    clock = find_clock(model)
    used = sorted(quantizers(model).values(), key=lambda quantizer: quantizer.row)
    rows = [quantizer.row for quantizer in used]
    clock.scale = clock.scale[rows]
    clock.zero = clock.zero[rows]
    for row, quantizer in enumerate(used):
        quantizer.row = row
