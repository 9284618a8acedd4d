"""torchao: quantize_ with its integer configs, compiled, and its static PT2E flow for x86."""

from functools import partial
from typing import Any

import torch
import torch._inductor.config as inductor
import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer as x86
from torch import nn
from torchao.quantization import (
    Int4WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8DynamicActivationIntxWeightConfig,
    Int8Tensor,
    Int8WeightOnlyConfig,
    IntxUnpackedToInt8Tensor,
    IntxWeightOnlyConfig,
    PerAxis,
    PerGroup,
    quantize_,
)
from torchao.quantization.pt2e import move_exported_model_to_eval
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.quantize_.workflows.intx.intx_choose_qparams_algorithm import (
    IntxChooseQParamsAlgorithm,
)

from lowtide import sampling
from peers.task import END_BITS, FLOAT, Bare, Bits, Held, Packed, Recipe, Served, Task, Unable

PACKAGES = ("torchao",)
GROUP = 32
HQQ = IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY


def config(bits: Bits, columns: int) -> Any:
    """The config that its documentation names for these bits.

    Below 8 bits it uses HQQ, and groups of GROUP columns where the columns divide into them.
    """
    granularity = PerAxis(0) if columns % GROUP else PerGroup(GROUP)
    if bits.weights == 8:
        if bits.quantized_inputs:
            return Int8DynamicActivationInt8WeightConfig()
        return Int8WeightOnlyConfig()
    width = getattr(torch, f"int{bits.weights}")
    if not bits.quantized_inputs:
        return IntxWeightOnlyConfig(width, granularity, intx_choose_qparams_algorithm=HQQ)
    return Int8DynamicActivationIntxWeightConfig(
        width, granularity, intx_choose_qparams_algorithm=HQQ
    )


def apply(task: Task, kinds: tuple[type, ...], names: list[str], bits: Bits) -> None:
    if task.bits.quantized_inputs and task.bits.inputs != 8:
        raise Unable(f"activations are int8, not {task.bits.inputs} bits")
    for name in names:
        layer = task.model.get_submodule(name)
        if isinstance(layer, kinds):
            chosen = config(bits, layer.weight.shape[1])
            quantize_(layer, chosen, filter_fn=lambda module, _: isinstance(module, kinds))


def fit(task: Task, kinds: tuple[type, ...]) -> Packed:
    """Layers of these kinds, compiled as its documentation says."""
    model = task.model
    apply(task, kinds, task.ends, Bits(max(END_BITS, task.bits.weights), task.bits.inputs))
    apply(task, kinds, task.inner, task.bits)
    # A layer that cannot run raises here, before a compiler wraps its message.
    with torch.no_grad():
        model(**task.calls[0])
    model.compile()
    return Packed(
        model, held(model), lambda folder: torch.save(model.state_dict(), folder / "model.pt")
    )


def held(model: nn.Module) -> dict[str, Held]:
    layers = {
        name: layer.weight
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    return {name: of for name, weight in layers.items() if (of := holds(weight)) is not None}


def holds(weight: Any) -> Held | None:
    if isinstance(weight, Int8Tensor):
        return Held(8, FLOAT if weight.act_quant_kwargs is None else 8)
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        width = int(str(weight.target_dtype).removeprefix("torch.int"))
        return Held(width, FLOAT if weight.activation_quantization is None else 8)
    return None


def packed_int4(task: Task) -> Packed:
    """Its one packed 4-bit weight format; other formats keep one weight a byte."""
    if task.bits != Bits(4, 16):
        raise Unable("Int4WeightOnlyConfig is W4A16 only")
    chosen = Int4WeightOnlyConfig(group_size=GROUP)
    quantize_(task.model, chosen)
    with torch.no_grad():
        task.model(**task.calls[0])
    return Packed(
        task.model,
        held(task.model),
        lambda folder: torch.save(task.model.state_dict(), folder / "model.pt"),
    )


def pt2e(task: Task) -> Packed:
    """Export, observe, convert; a compiler with frozen weights puts oneDNN's int8 kernels in."""
    model = task.model
    names = tuple(task.calls[0])
    exported = torch.export.export(Bare(model, names), tuple(task.calls[0].values())).module()
    prepared = prepare_pt2e(exported, quantizer())
    with torch.no_grad():
        for call in task.calls:
            prepared(*call.values())
    converted = move_exported_model_to_eval(convert_pt2e(prepared))
    layers = graph_layers(converted)
    whole = torch.export.export(converted, tuple(task.calls[0].values()))
    inductor.freezing = True
    task.replace(Served(model, names, torch.compile(converted)))
    return Packed(
        sampling.denoiser(task.pipe),
        layers,
        lambda folder: torch.export.save(whole, folder / "model.pt2"),
    )


def quantizer() -> Any:
    """A config for each kind of layer.

    set_global would observe the integer timestep too, and its histogram takes no integers.
    """
    chosen = x86.get_default_x86_inductor_quantization_config()
    quantizer = x86.X86InductorQuantizer().set_module_type_qconfig(nn.Conv2d, chosen)
    return quantizer.set_module_type_qconfig(nn.Linear, chosen)


def graph_layers(graph: torch.fx.GraphModule) -> dict[str, Held]:
    """Which matrix products of the converted graph read codes, by the name of their module."""
    products = (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)
    nodes = [node for node in graph.graph.nodes if node.target in products]
    return {
        module_name(node): Held(*(8 if from_codes(node.args[place]) else FLOAT for place in (1, 0)))
        for node in nodes
    }


def module_name(node: torch.fx.Node) -> str:
    path = list(node.meta["nn_module_stack"].values())[-1][0]
    return path.split("model.", 1)[-1]


def from_codes(value: Any) -> bool:
    return "dequantize" in str(getattr(value, "target", ""))


RECIPES = {
    "convolutions and linears": Recipe(partial(fit, kinds=(nn.Linear, nn.Conv2d))),
    "linears": Recipe(partial(fit, kinds=(nn.Linear,))),
    "linears, packed int4": Recipe(packed_int4, lambda bits: bits == Bits(4, 16)),
    "PT2E x86": Recipe(pt2e, lambda bits: bits == Bits(8, 8)),
}
