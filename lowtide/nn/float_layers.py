"""Float layers of a model: get one by name, replace it, and build a layer of the same shape."""

from typing import TypedDict

from torch import nn

FloatLayer = nn.Linear | nn.Conv2d


def float_layer(root: nn.Module, name: str) -> FloatLayer:
    """The Linear or Conv2d with that dotted name."""
    layer = root.get_submodule(name)
    assert isinstance(layer, FloatLayer), f"{name} is a {type(layer).__name__}"
    return layer


def bias_of(layer: FloatLayer) -> nn.Parameter | None:
    """The bias as a parameter, which the annotations of torch do not say."""
    assert layer.bias is None or isinstance(layer.bias, nn.Parameter)
    return layer.bias


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Set the submodule with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    root.get_submodule(parent)._modules[leaf] = module


class LinearOptions(TypedDict):
    """Arguments of nn.Linear."""

    in_features: int
    out_features: int
    bias: bool
    device: str


class ConvOptions(TypedDict):
    """Arguments of nn.Conv2d."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    bias: bool
    device: str


def linear_options(layer: nn.Linear) -> LinearOptions:
    """The arguments for a layer of the same shape without data, on the meta device."""
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": layer.bias is not None,
        "device": "meta",
    }


def conv_options(layer: nn.Conv2d) -> ConvOptions:
    """The arguments for a convolution of the same shape without data, on the meta device."""
    return {
        "in_channels": layer.in_channels,
        "out_channels": layer.out_channels,
        "kernel_size": _pair(layer.kernel_size),
        "stride": _pair(layer.stride),
        "padding": layer.padding if isinstance(layer.padding, str) else _pair(layer.padding),
        "dilation": _pair(layer.dilation),
        "groups": layer.groups,
        "bias": layer.bias is not None,
        "device": "meta",
    }


def _pair(size: tuple[int, ...]) -> tuple[int, int]:
    height, width = size
    return height, width
