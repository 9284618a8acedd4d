"""The forward pass of a packed denoiser, recorded on a float twin without data."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models.trace import Graph, mapped, on_meta, record
from lowtide.nn.attention import QuantAttention, set_unrounded
from lowtide.nn.feature_cache import Cached, ZeroFeatures
from lowtide.nn.float_layers import conv_options, linear_options, replace_module
from lowtide.nn.packed import Packed, PackedConv2d, PackedLinear
from lowtide.nn.quantized import QuantConv2d, QuantLinear
from lowtide.nn.request_features import PerRequest
from lowtide.nn.swap import packed_layers
from lowtide.runtime.writes import Unfollowed


def record_twin(root: nn.Module, inputs: Mapping[str, Any]) -> Graph:
    """The calls of the forward pass on inputs of these shapes; each layer is one call."""
    twin = _twin(root)
    kinds = (nn.Linear, nn.Conv2d, ZeroFeatures)
    leaves = {
        name.removesuffix(f".{_LAYER}"): module
        for name, module in twin.named_modules()
        if isinstance(module, kinds)
    }
    try:
        return record(twin, mapped(dict(inputs), _on_meta), leaves)
    except BadInput as error:
        raise Unfollowed("its forward pass needs the values of its inputs") from error


def _twin(root: nn.Module) -> nn.Module:
    """A copy on the meta device with float layers, without hooks of the root and not fused."""
    fused = root.__dict__.pop("forward", None)
    try:
        # The twin replaces all packed layers, so it does not copy them.
        twin = on_meta(root, shared=[layer for _, layer in packed_layers(root)])
    finally:
        if fused is not None:
            root.__dict__["forward"] = fused
    twin._forward_pre_hooks.clear()
    twin._forward_hooks.clear()
    kind = _float_type(twin)
    _unwrap(twin, kind)
    for name, module in list(twin.named_modules()):
        if isinstance(module, PackedLinear | PackedConv2d | QuantLinear | QuantConv2d):
            replace_module(twin, name, _with_side(module, _float_layer(module, kind)))
    return twin.eval()


def _float_type(root: nn.Module) -> torch.dtype:
    """The type of the first float parameter, as diffusers' own `dtype` has it."""
    kinds = [each.dtype for each in root.parameters() if each.dtype.is_floating_point]
    return kinds[0] if kinds else torch.float32


def _unwrap(twin: nn.Module, kind: torch.dtype) -> None:
    """Replace what stands around layers: rounded attention, cached features."""
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantAttention):
            owner: Any = twin.get_submodule(name.rpartition(".")[0])
            set_unrounded(owner)
        elif isinstance(module, Cached):
            replace_module(twin, name, ZeroFeatures(module.plan.width))
        elif isinstance(module, PerRequest):
            replace_module(twin, name, _float_layer(module.layer, kind))


class TwinLinear(nn.Linear):
    """A linear layer that computes in the type of its input, as a packed layer does."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class TwinConv2d(nn.Conv2d):
    """A convolution that computes in the type of its input, as a packed layer does."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return self._conv_forward(input, self.weight.to(input.dtype), bias)


# The name of a layer beside its side branch. In the graph it has the name of the whole.
_LAYER = "twin_layer"


class TwinWithSide(nn.Module):
    """A layer and its side branch, each a call of its own."""

    def __init__(self, layer: nn.Module, side: nn.Module):
        super().__init__()
        self.twin_layer = layer
        self.side = side

    def forward(self, input: Tensor) -> Tensor:
        output = self.twin_layer(input)
        return (output + self.side(input)).to(output.dtype)


def _with_side(module: nn.Module, layer: nn.Module) -> nn.Module:
    """The layer, together with the branch that the packed module has."""
    side = module.side if isinstance(module, Packed) else None
    return layer if side is None else TwinWithSide(layer, on_meta(side))


def _float_layer(module: nn.Module, kind: torch.dtype) -> nn.Module:
    """A float layer of the same shape, with parameters of this type."""
    if isinstance(module, nn.Conv2d):
        return TwinConv2d(**conv_options(module)).to(kind)
    assert isinstance(module, nn.Linear)
    return TwinLinear(**linear_options(module)).to(kind)


def _on_meta(leaf: Any) -> Any:
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
