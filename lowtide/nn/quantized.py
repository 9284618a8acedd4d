"""Quantized layers before packing: the float weight, its codes, and a rounding while it learns."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import Grid, Mixed, WeightFormat
from lowtide.kernels import divide
from lowtide.nn.float_layers import FloatLayer, conv_options, linear_options
from lowtide.nn.lora import LoRA, WeightGrid
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.rounding import AdaRound

INSIDE = 0.49  # of a step: a value this near to a code rounds to it


class QuantizedLayer(nn.Module):
    """What QuantLinear and QuantConv2d share: a weight that is used as float, as codes, or between.

    `quantized` says whether the weight is rounded at the moment. A layer without a format stays in
    float and has no grid and no codes. `smooth` is the divisors of the input channels, or empty.
    """

    weight: Tensor
    bias: Tensor | None
    format: WeightFormat | None
    input: Quantizer
    rounding: AdaRound | LoRA | None
    quantized: bool
    smooth: Tensor
    _grid: Grid | None
    _codes: Tensor | None

    def _adopt(self, layer: FloatLayer, format: WeightFormat | None, inputs: Quantizer) -> None:
        """Take the parameters of a float layer: the same tensors, no copies."""
        self.weight = layer.weight
        self.bias = layer.bias
        self.training = layer.training
        self.format = format
        self.input = inputs
        self.rounding = None
        self.quantized = False
        self._grid = None
        self._codes = None
        empty = self.weight.new_empty(0, dtype=torch.float32)
        self.register_buffer("smooth", empty, persistent=False)

    @property
    def grid(self) -> Grid:
        """Scales, zero points and factors of the weight."""
        assert self._grid is not None, "the layer has no grid yet"
        return self._grid

    @grid.setter
    def grid(self, grid: Grid | None) -> None:
        self._grid = grid

    @property
    def codes(self) -> Tensor:
        """The codes of the weight as uint8, rows x columns."""
        assert self._codes is not None, "the layer has no codes yet"
        return self._codes

    def _format(self) -> WeightFormat:
        assert self.format is not None, "the layer stays in float"
        return self.format

    def set_smooth(self, smooth: Tensor) -> None:
        """Divide the input channels by `smooth`, and multiply the columns of the weight by it.

        The output in float stays the same.
        """
        self.register_buffer("smooth", smooth.to(torch.float32))

    @property
    def divisors(self) -> Tensor:
        """The divisor of each input channel."""
        if self.smooth.numel():
            return self.smooth
        return torch.ones(self.weight.shape[1], device=self.weight.device)

    def smoothed_weight(self) -> Tensor:
        """The float weight that is rounded: with its columns multiplied by `smooth`."""
        weight = self.weight.detach()
        if not self.smooth.numel():
            return weight
        return weight.float() * self._by_channel(self.smooth)

    def _by_channel(self, smooth: Tensor) -> Tensor:
        """Divisors in a shape that broadcasts to the weight and to the input."""
        return smooth.reshape(-1, *[1] * (self.weight.dim() - 2))

    def rounded_input(self, x: Tensor) -> Tensor:
        """The input of the product: divided and rounded, or unchanged."""
        return self.input(divide(x, self._by_channel(self.smooth)))

    def set_grid(self, grid: Grid) -> None:
        """Set the grid, and round the weight to the nearest codes."""
        self.grid = grid
        self._codes = self._format().encode(self.smoothed_weight(), grid)
        self.quantized = True

    def set_codes(self, codes: Tensor) -> None:
        self._codes = codes
        self.rounding = None

    def _steps(self) -> Grid:
        """The grid with its factors in the scale, rows x columns."""
        return self._format().steps(self.grid, self.weight.shape[1:].numel())

    def position(self) -> Tensor:
        """Each weight in units of its step, counted from code 0: rows x columns."""
        steps = self._steps()
        return (self.smoothed_weight().flatten(1).float() / steps.scale).add_(steps.zero)

    def start_rounding(self, *, warm: bool = False) -> AdaRound:
        """Learn the rounding from here on.

        It starts at rounding to nearest, or, for a warm start, near the present codes.
        """
        position = self.position()
        up = self.codes > position.floor() if warm else None
        self.rounding = AdaRound(position, self._decoded, up)
        return self.rounding

    def _decoded(self, codes: Tensor) -> Tensor:
        """The weights of float codes, rows x columns; codes outside the grid are clamped first."""
        steps = self._steps()
        return (self._clamped(codes) - steps.zero) * steps.scale

    def _clamped(self, codes: Tensor) -> Tensor:
        return codes.clamp(min=0).minimum(self.top(codes))

    def finish_rounding(self) -> Tensor:
        """Make the soft decisions hard, and keep the codes."""
        assert isinstance(self.rounding, AdaRound), "no rounding was started"
        # The weight and its grid are as they were, so its position need not be kept meanwhile.
        codes = self.position().floor_().add_(self.rounding.hard()).clamp_(min=0)
        codes = torch.minimum(codes, self.top(codes), out=codes).to(torch.uint8)
        self.set_codes(codes)
        return codes

    def start_lora(self, rank: int, generator: torch.Generator) -> LoRA:
        """Learn a low-rank change of the weight, and its scales, from the present codes on."""
        weight = self._start_weight()
        weight_grid = WeightGrid(self._format(), self.grid, self.top(weight))
        self.rounding = LoRA(weight, weight_grid, rank, generator)
        return self.rounding

    def _start_weight(self) -> Tensor:
        """The float weight nearest to the original that rounds to the present codes.

        It differs from the original where a code is not the nearest one. Rows x columns.
        """
        weight = self.smoothed_weight().flatten(1).float()
        codes = self.codes.float()
        steps = self._steps()
        nearest = self.position().clamp(codes - INSIDE, codes + INSIDE)
        differs = self.codes != self._format().encode(weight, self.grid)
        return torch.where(differs, (nearest - steps.zero) * steps.scale, weight)

    def finish_lora(self) -> None:
        """Merge the change into the codes, and keep the scales that were learned."""
        assert isinstance(self.rounding, LoRA), "no LoRA was started"
        codes, grid = self.rounding.merged()
        self.set_codes(codes)
        self.grid = grid

    def top(self, like: Tensor) -> Tensor:
        """The last code: one for all rows, or rows x 1, on the device of `like`."""
        form = self._format()
        if isinstance(form, Mixed):
            return form.levels(like) - 1
        return torch.tensor(float(form.top), device=like.device)

    def effective_weight(self) -> Tensor:
        """The weight as the layer uses it now."""
        if not self.quantized:
            return self.smoothed_weight().to(self.weight.dtype)
        if self.rounding is not None:
            values = self.rounding.values()
        else:
            values = self._format().decode(self.codes, self.grid)
        return values.reshape(self.weight.shape).to(self.weight.dtype)

    def set_precision(self, precision: Precision) -> None:
        """Round weights and inputs as the precision says."""
        self.quantized = precision.weights and self._grid is not None
        self.input.enabled = precision.inputs


class QuantLinear(QuantizedLayer, nn.Linear):
    """A linear layer whose weight and input are rounded, computed in float."""

    def __init__(self, layer: nn.Linear, format: WeightFormat | None, inputs: Quantizer):
        nn.Linear.__init__(self, **linear_options(layer))
        self._adopt(layer, format, inputs)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.rounded_input(input), self.effective_weight(), self.bias)


class QuantConv2d(QuantizedLayer, nn.Conv2d):
    """A convolution whose weight and input are rounded, computed in float."""

    def __init__(self, layer: nn.Conv2d, format: WeightFormat | None, inputs: Quantizer):
        nn.Conv2d.__init__(self, **conv_options(layer))
        self._adopt(layer, format, inputs)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(self.rounded_input(input), self.effective_weight(), self.bias)


def quantized_layer(
    layer: FloatLayer, format: WeightFormat | None, inputs: Quantizer
) -> QuantLinear | QuantConv2d:
    """The quantized layer with the parameters of a float Linear or Conv2d."""
    if isinstance(layer, nn.Conv2d):
        return QuantConv2d(layer, format, inputs)
    return QuantLinear(layer, format, inputs)
