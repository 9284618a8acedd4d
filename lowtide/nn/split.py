"""Split: a layer on two concatenated tensors as the sum of two layers, so that each half can have ranges of its own."""

from torch import Tensor, nn


class SplitLayer(nn.Module):
    """`first` reads the first `width` channels, `second` the rest; the bias stays with the first. Exact."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, width: int):
        super().__init__()
        self.width, self.axis = width, 1 if isinstance(layer, nn.Conv2d) else -1
        first, second = layer.weight.detach().split([width, layer.weight.shape[1] - width], 1)
        self.first = part(layer, first, layer.bias)
        self.second = part(layer, second, None)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.split([self.width, x.shape[self.axis] - self.width], self.axis)
        return self.first(first) + self.second(second)


def part(
    layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: nn.Parameter | None
) -> nn.Linear | nn.Conv2d:
    """The same kind of layer on fewer input channels."""
    if isinstance(layer, nn.Conv2d):
        shape = (
            weight.shape[1],
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        twin = nn.Conv2d(*shape, bias=bias is not None, device="meta")
    else:
        twin = nn.Linear(weight.shape[1], layer.out_features, bias is not None, device="meta")
    twin.weight, twin.bias = nn.Parameter(weight.contiguous(), requires_grad=False), bias
    return twin.train(layer.training)


def split_modules(root: nn.Module, splits: dict[str, int]) -> None:
    """Rewrite these layers, each at its width."""
    for name, width in splits.items():
        parent, _, leaf = name.rpartition(".")
        root.get_submodule(parent)._modules[leaf] = SplitLayer(root.get_submodule(name), width)
