"""Quantized layers before packing: the float weight, the codes chosen for it, and the rounding while it is learnt."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import Affine, Grid, Mixed
from lowtide.kernels import divide
from lowtide.nn.lora import Lattice, LoRA
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.rounding import AdaRound

INSIDE = 0.49  # of a step: a value this near to a code rounds to it


class QuantizedLayer:
    """What QuantLinear and QuantConv2d share: a weight that can be read as float, as codes, or half-way."""

    weight: nn.Parameter
    format: Affine | Mixed | None
    input: Quantizer
    rounding: AdaRound | LoRA | None

    def adopt(self, layer: nn.Module, format: Affine | Mixed | None, inputs: Quantizer) -> None:
        """Take over a float layer's parameters (the same tensors, no copy)."""
        self.weight, self.bias, self.training = layer.weight, layer.bias, layer.training
        self.format, self.input, self.rounding = format, inputs, None
        self.quantized, self.grid, self.codes = False, None, None
        self.register_buffer(
            "smooth", self.weight.new_empty(0, dtype=torch.float32), persistent=False
        )

    def set_smooth(self, smooth: Tensor) -> None:
        """Divide input channels by this from now on, and multiply the weight's columns: the float answer stays the same."""
        self.register_buffer("smooth", smooth.to(torch.float32))

    @property
    def divisors(self) -> Tensor:
        """What each input channel is divided by."""
        return (
            self.smooth
            if self.smooth.numel()
            else torch.ones(self.weight.shape[1], device=self.weight.device)
        )

    def whole_weight(self) -> Tensor:
        """The float weight that is rounded: what smoothing makes of it."""
        weight = self.weight.detach()
        if not self.smooth.numel():
            return weight
        return weight.float() * self.smooth.reshape(-1, *[1] * (weight.dim() - 2))

    def whole_input(self, x: Tensor) -> Tensor:
        """The input as the product takes it: divided and rounded, or as it is."""
        return self.input(divide(x, self.smooth.reshape(-1, *[1] * (self.weight.dim() - 2))))

    def set_grid(self, grid: Grid) -> None:
        """Fix where the values lie and round to the nearest of them."""
        self.grid = grid
        self.codes = self.format.encode(self.whole_weight(), grid)
        self.quantized = True

    def set_codes(self, codes: Tensor) -> None:
        self.codes, self.rounding = codes, None

    def position(self) -> Tensor:
        """Each weight in units of its step, from code 0."""
        flat, grid = self.whole_weight().flatten(1).float(), self.grid
        steps = self.format.steps(grid, flat.shape[1])
        return flat / steps.scale + steps.zero

    def start_rounding(self, warm: bool = False) -> AdaRound:
        """Learn the rounding from here on; it starts at rounding to nearest, or, warm, at the codes chosen before."""
        position = self.position()
        self.rounding = AdaRound(
            position, self.decoded, self.codes > position.floor() if warm else None
        )
        return self.rounding

    def decoded(self, codes: Tensor) -> Tensor:
        """The weights of these codes, which may lie beyond the grid's ends, rows x columns."""
        steps = self.format.steps(self.grid, codes.shape[1])
        return (codes.clamp(min=0).minimum(self.top(codes)) - steps.zero) * steps.scale

    def finish_rounding(self) -> Tensor:
        """Make the soft decisions hard and keep the codes."""
        codes = (
            (self.rounding.floor + self.rounding.hard())
            .clamp(min=0)
            .minimum(self.top(self.rounding.floor))
        )
        self.set_codes(codes.to(torch.uint8))
        return self.codes

    def start_lora(self, rank: int, generator: torch.Generator) -> LoRA:
        """Learn a low-rank change of the weight, and its scales, from here on; it starts at the codes chosen before."""
        weight = self.rounding_weight()
        self.rounding = LoRA(
            weight, Lattice(self.format, self.grid, self.top(weight)), rank, generator
        )
        return self.rounding

    def rounding_weight(self) -> Tensor:
        """The weight, rows x columns; where another code than the nearest was chosen, the nearest value that rounds to it."""
        weight, codes = self.whole_weight().flatten(1).float(), self.codes.float()
        steps = self.format.steps(self.grid, weight.shape[1])
        pulled = self.position().clamp(codes - INSIDE, codes + INSIDE)
        other = self.codes != self.format.encode(weight, self.grid)
        return torch.where(other, (pulled - steps.zero) * steps.scale, weight)

    def finish_lora(self) -> None:
        """Merge the change into the codes, and keep the scales it learnt."""
        codes, grid = self.rounding.merged()
        self.set_codes(codes)
        self.grid = grid

    def top(self, like: Tensor) -> Tensor:
        if isinstance(self.format, Mixed):
            return self.format.levels(like) - 1
        return torch.tensor(float(self.format.top), device=like.device)

    def effective_weight(self) -> Tensor:
        """The weight as the layer uses it now."""
        if not self.quantized:
            return self.whole_weight().to(self.weight.dtype)
        values = (
            self.rounding.values()
            if self.rounding is not None
            else self.format.decode(self.codes, self.grid)
        )
        return values.reshape(self.weight.shape).to(self.weight.dtype)

    def set_precision(self, precision: Precision) -> None:
        """Behave as float, with quantized weights, or with quantized weights and inputs."""
        self.quantized = precision.weights and self.grid is not None
        self.input.enabled = precision.inputs


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer whose weight and input are rounded, computed in float."""

    def __init__(self, layer: nn.Linear, format: Affine | Mixed | None, inputs: Quantizer):
        nn.Linear.__init__(
            self, layer.in_features, layer.out_features, layer.bias is not None, device="meta"
        )
        self.adopt(layer, format, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.whole_input(x), self.effective_weight(), self.bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution whose weight and input are rounded, computed in float."""

    def __init__(self, layer: nn.Conv2d, format: Affine | Mixed | None, inputs: Quantizer):
        shape = (
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
        )
        nn.Conv2d.__init__(self, *shape, layer.groups, layer.bias is not None, device="meta")
        self.adopt(layer, format, inputs)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.whole_input(x), self.effective_weight(), self.bias)


def quantized_layer(
    layer: nn.Module, format: Affine | Mixed | None, inputs: Quantizer
) -> QuantLinear | QuantConv2d:
    """The quantized twin of a float Linear or Conv2d."""
    return (QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear)(layer, format, inputs)
