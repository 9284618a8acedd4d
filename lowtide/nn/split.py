"""Split: a layer on two concatenated tensors as the sum of two layers, each with its own ranges."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowtide.nn.float_layers import (
    FloatLayer,
    bias_of,
    conv_options,
    float_layer,
    linear_options,
    replace_module,
)

if TYPE_CHECKING:
    from lowtide.models import Adapter


class SplitLayer(nn.Module):
    """`first` reads the first `width` channels and has the bias; `second` reads the other channels.

    Their sum is exact.
    """

    def __init__(self, layer: FloatLayer, width: int):
        super().__init__()
        self.width = width
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        first, second = layer.weight.detach().split([width, layer.weight.shape[1] - width], 1)
        self.first = _part(layer, first, bias_of(layer))
        self.second = _part(layer, second, None)

    def joined(self) -> FloatLayer:
        """One float layer again, once both parts are float layers."""
        weight = torch.cat([self.first.weight, self.second.weight], 1)
        layer = _empty_part(self.first, weight.shape[1], bias=self.first.bias is not None)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.register_parameter("bias", bias_of(self.first))
        return layer.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([self.width, x.shape[self.axis] - self.width], self.axis)
        return self.first(first) + self.second(second)


def _part(layer: FloatLayer, weight: Tensor, bias: nn.Parameter | None) -> FloatLayer:
    """A layer of the same kind on fewer input channels, with these parameters."""
    part = _empty_part(layer, weight.shape[1], bias=bias is not None)
    part.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    part.register_parameter("bias", bias)
    return part.train(layer.training)


def _empty_part(layer: FloatLayer, channels: int, *, bias: bool) -> FloatLayer:
    if isinstance(layer, nn.Conv2d):
        convolution = conv_options(layer)
        convolution["in_channels"] = channels
        convolution["bias"] = bias
        return nn.Conv2d(**convolution)
    options = linear_options(layer)
    options["in_features"] = channels
    options["bias"] = bias
    return nn.Linear(**options)


def split_modules(root: nn.Module, splits: dict[str, int]) -> None:
    """Replace these layers by split ones: `splits` is layer name to width of the first part."""
    for name, width in splits.items():
        replace_module(root, name, SplitLayer(float_layer(root, name), width))


def shape_adapter(
    root: nn.Module, splits: dict[str, int], example: Mapping[str, Any] = {}
) -> "Adapter":
    """The adapter of the float model, on a copy with these splits that has shapes and no data.

    `example`: its recorded architecture, if its class is unknown.
    """
    # The import comes late: this module is imported while diffusers is still being imported, and
    # lowtide.models needs the whole of diffusers.
    from lowtide.models import adapt
    from lowtide.models.described import described_adapter

    packed: Any = root  # a diffusers ModelMixin, which has a configuration
    with torch.device("meta"):
        model = type(packed).from_config(packed.config)
        split_modules(model, splits)
    cast = model if packed.dtype == model.dtype else model.to(packed.dtype)
    return described_adapter(cast, example) if example else adapt(cast)
