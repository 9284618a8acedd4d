"""Put quantized or packed layers where a plan wants them, and take hold of all of them again by name."""

from collections.abc import Iterator

from torch import nn

from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import Clock
from lowtide.nn.fake import QuantConv2d, QuantLinear, quantized_layer
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_layer, packed_twin
from lowtide.nn.quantizer import Quantizer
from lowtide.plan import LayerPlan, Plan

QuantLayer = QuantLinear | QuantConv2d
PackedLayer = PackedLinear | PackedConv2d
CLOCK = "lowtide_clock"


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = module


def quantizer(plan: LayerPlan, clock: Clock) -> Quantizer:
    return Quantizer(plan.input, clock if plan.per_step else None, len(clock.known))


def add_clock(root: nn.Module, plan: Plan) -> Clock:
    """Give the denoiser its clock, listening at the denoiser's calls."""
    clock = Clock(plan.timesteps, plan.ticks)
    clock.attach(root)
    root.add_module(CLOCK, clock)
    return clock


def quantize_modules(root: nn.Module, plan: Plan) -> Clock:
    """Swap in simulated layers and attention; nothing is rounded until their grids are set."""
    clock = add_clock(root, plan)
    for name, layer in plan.layers.items():
        replace_module(root, name, quantized_layer(root.get_submodule(name), layer.weight, quantizer(layer, clock)))
    add_attention(root, plan, clock)
    return clock


def add_attention(root: nn.Module, plan: Plan, clock: Clock) -> None:
    for name, parts in plan.attentions.items():
        module = root.get_submodule(name)
        module.set_processor(QuantAttention(module.processor, {part: quantizer(of, clock) for part, of in parts.items()}))


def skeleton(root: nn.Module, plan: Plan) -> None:
    """Swap in empty packed layers, for a checkpoint to fill."""
    clock = add_clock(root, plan)
    for name, layer in plan.layers.items():
        build = quantized_layer if layer.weight is None else packed_layer
        replace_module(root, name, build(root.get_submodule(name), layer.weight, quantizer(layer, clock)))
    add_attention(root, plan, clock)
    enable_inputs(root)


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
        shape = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        twin = nn.Conv2d(*shape, layer.groups, layer.bias is not None, device="meta")
    else:
        twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    twin.weight, twin.bias = layer.weight, layer.bias
    return twin.train(layer.training)


def enable_inputs(root: nn.Module) -> None:
    for module in root.modules():
        if isinstance(module, Quantizer):
            module.enabled = True
        elif isinstance(module, QuantAttention):
            module.active = True


def quant_layers(root: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    return ((name, module) for name, module in root.named_modules() if isinstance(module, QuantLayer))


def packed_layers(root: nn.Module) -> Iterator[tuple[str, PackedLayer]]:
    return ((name, module) for name, module in root.named_modules() if isinstance(module, PackedLayer))


def look(root: nn.Module, quantized: bool, inputs: bool) -> None:
    """Make every quantized part below `root` behave as float, weights only, or weights and inputs."""
    for module in root.modules():
        if isinstance(module, QuantLayer | QuantAttention):
            module.look(quantized, inputs)


def find_clock(root: nn.Module) -> Clock:
    return root.get_submodule(CLOCK)
