"""Make a packed model a float one again, with the rounded weights."""

import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.kernels import Spec
from lowtide.kernels.ops import unpack_weight
from lowtide.nn.attention import attention_block, set_unrounded
from lowtide.nn.clock import CLOCK, SetClock
from lowtide.nn.float_layers import bias_of, conv_options, linear_options, replace_module
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.plan import Plan
from lowtide.nn.split import SplitLayer
from lowtide.nn.swap import packed_layers, plain_layer, quant_layers


def check_layers_alone(plan: Plan) -> None:
    """Only layers have float weights to go back to; tables of features and corrections have not."""
    tables = {
        "tables in the place of temporal layers": [*plan.cached, *plan.blank],
        "features that are computed once a request": list(plan.requests),
        "corrections of its answer": [plan.corrected] if plan.corrected else [],
    }
    if found := [what for what, names in tables.items() if names]:
        raise BadInput(
            f"found a model with {found[0]}, which no float layer can hold",
            "a model of quantized layers alone",
            "load the float model, or quantize with --method minmax and dequantize that",
        )


@torch.no_grad()
def dequantize_modules(root: nn.Module, plan: Plan, dtype: torch.dtype) -> None:
    """Replace packed layers by float ones in this type; inputs are not rounded any more."""
    check_layers_alone(plan)
    for name, layer in dict(packed_layers(root)).items():
        replace_module(root, name, _float_layer(layer, dtype))
    for name, layer in dict(quant_layers(root)).items():
        replace_module(root, name, plain_layer(layer))
    for name in plan.splits:
        split = root.get_submodule(name)
        assert isinstance(split, SplitLayer)
        replace_module(root, name, split.joined())
    for name in plan.attentions:
        set_unrounded(attention_block(root, name))
    hooks = root._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, SetClock)]:
        del hooks[number]
        root._forward_pre_hooks_with_kwargs.pop(number, None)
    delattr(root, CLOCK)


def _float_layer(layer: PackedLinear | PackedConv2d, dtype: torch.dtype) -> nn.Linear | nn.Conv2d:
    """The float layer with the values that the codes stand for."""
    tables = layer.tables()
    values = unpack_weight(layer.codes(), tables, Spec.of(layer.spec))
    *_, smooth = tables
    plain = (
        nn.Conv2d(**conv_options(layer))
        if isinstance(layer, nn.Conv2d)
        else nn.Linear(**linear_options(layer))
    )
    values = values.reshape(plain.weight.shape)
    if smooth.numel():
        # The layer divides its input by these numbers; a float layer divides its weight.
        values = values / smooth.reshape(-1, *[1] * (values.dim() - 2))
    bias = bias_of(layer)
    if layer.side is not None:
        change = layer.side.as_addition(layer)
        values = values + change.weight
        bias = change.added_to(bias)
    plain.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    plain.register_parameter("bias", bias)
    return plain.train(layer.training)
