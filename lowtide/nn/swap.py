"""Put quantized or packed layers where a plan wants them, and take hold of all of them again by name."""

from collections.abc import Iterator

import torch
from torch import nn

from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import CLOCK, Clock
from lowtide.nn.correction import add_correction
from lowtide.nn.feature_cache import Blank, Cached
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_layer, packed_twin
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantConv2d, QuantLinear, quantized_layer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_cache import answer_by_request
from lowtide.nn.split import split_modules

QuantLayer = QuantLinear | QuantConv2d
PackedLayer = PackedLinear | PackedConv2d


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = module


class Builder:
    """Hands out quantizers, each with the next row of the clock's table, in the plan's order."""

    def __init__(self, root: nn.Module, plan: Plan):
        plans = [
            *plan.layers.values(),
            *(part for parts in plan.attentions.values() for part in parts.values()),
        ]
        used = [each for each in plans if each.input is not None]
        self.clock = Clock(
            plan.timesteps, plan.ticks, len(used), any(each.per_step for each in used), plan.keyed
        )
        self.rows = 0
        self.clock.attach(root)
        root.add_module(CLOCK, self.clock)

    def quantizer(self, plan: LayerPlan) -> Quantizer:
        row = self.rows
        self.rows += plan.input is not None
        return Quantizer(plan.input, self.clock, row, plan.per_step)


def quantize_modules(root: nn.Module, plan: Plan) -> None:
    """Swap in simulated layers and attention; nothing is rounded until their grids are set."""
    builder = Builder(root, plan)
    for name, layer in plan.layers.items():
        replace_module(
            root,
            name,
            quantized_layer(root.get_submodule(name), layer.weight, builder.quantizer(layer)),
        )
    add_attention(root, plan, builder)


def add_attention(root: nn.Module, plan: Plan, builder: Builder) -> None:
    for name, parts in plan.attentions.items():
        module = root.get_submodule(name)
        quantizers = {part: builder.quantizer(of) for part, of in parts.items()}
        module.set_processor(QuantAttention(module.processor, quantizers))


def skeleton(root: nn.Module, plan: Plan) -> None:
    """Swap in empty packed layers, for a checkpoint to fill."""
    split_modules(root, plan.splits)
    builder = Builder(root, plan)
    for name, layer in plan.layers.items():
        replace_module(
            root, name, empty_layer(root.get_submodule(name), layer, builder.quantizer(layer))
        )
    add_attention(root, plan, builder)
    for name, cache in plan.cached.items():
        replace_module(
            root,
            name,
            Cached(
                cache,
                builder.clock,
                root.get_submodule(name) if cache.computed or cache.kept else None,
            ),
        )
    for name, width in plan.blank.items():
        replace_module(root, name, Blank(width))
    if plan.corrected:
        add_correction(root, plan.corrected)
    if plan.requests:
        answer_by_request(root, plan)
    enable_inputs(root)


def empty_layer(module: nn.Module, plan: LayerPlan, inputs: Quantizer) -> nn.Module:
    """The layer as the plan wants it, without its data."""
    if plan.weight is not None:
        return packed_layer(module, plan.weight, inputs, plan.smooth)
    layer = quantized_layer(module, None, inputs)
    if plan.smooth:
        layer.set_smooth(torch.empty(module.weight.shape[1]))
    return layer


def pack_modules(root: nn.Module) -> None:
    """Quantized layers become packed ones; a layer with nothing quantized becomes a plain one again."""
    for name, layer in dict(quant_layers(root)).items():
        if layer.format is not None:
            replace_module(root, name, packed_twin(layer))
        elif layer.input.format is None:
            replace_module(root, name, plain(layer))
    enable_inputs(root)


def plain(layer: QuantLayer) -> nn.Linear | nn.Conv2d:
    """The ordinary layer with the same parameters."""
    if isinstance(layer, nn.Conv2d):
        shape = (
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        twin = nn.Conv2d(*shape, layer.groups, layer.bias is not None, device="meta")
    else:
        twin = nn.Linear(
            layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin.train(layer.training)


def enable_inputs(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, Quantizer):
            module.enabled = True
        elif isinstance(module, QuantAttention):
            module.active = True


def quant_layers(root: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    return (
        (name, module) for name, module in root.named_modules() if isinstance(module, QuantLayer)
    )


def packed_layers(root: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    return (
        (name, module) for name, module in root.named_modules() if isinstance(module, PackedLayer)
    )


def set_precision(root: nn.Module, precision: Precision) -> None:
    """Make every quantized part below `root` behave as float, weights only, or weights and inputs."""
    for module in root.modules():
        if isinstance(module, QuantLayer | QuantAttention | Cached):
            module.set_precision(precision)


def find_clock(root: nn.Module) -> Clock:
    return root.get_submodule(CLOCK)


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    found = (
        (name, module) for name, module in model.named_modules() if isinstance(module, Quantizer)
    )
    return {name: module for name, module in found if module.format is not None}


def drop_unused_rows(model: nn.Module) -> None:
    """Close the gaps in the table of ranges, so that a skeleton built from the plan has the same rows."""
    clock, used = (
        find_clock(model),
        sorted(quantizers(model).values(), key=lambda quantizer: quantizer.row),
    )
    rows = [quantizer.row for quantizer in used]
    clock.scale, clock.zero = clock.scale[rows], clock.zero[rows]
    for row, quantizer in enumerate(used):
        quantizer.row = row
