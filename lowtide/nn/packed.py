"""Packed layers: codes at their true bit-width and the tables that decode them.

A checkpoint holds packed layers, and they are what runs. They are subclasses of nn.Linear and
nn.Conv2d, because diffusers and peft ask for these classes; their `weight` is the packed bytes.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowtide.formats import (
    Mixed,
    OwnRange,
    PackedTable,
    Stepped,
    WeightFormat,
    pack,
    pack_mixed,
    pack_tables,
    packed_bytes,
    table_words,
    unpack_tables,
)
from lowtide.kernels import Spec, conv2d, divide, linear
from lowtide.kernels.integers import Rows, rows_of_grid
from lowtide.kernels.panels import Panels, arranged, restore
from lowtide.kernels.triton.resident import (
    ResidentWeight,
    checkpoint_codes,
    in_one_buffer,
    resident_weight,
)
from lowtide.nn.float_layers import FloatLayer, conv_options, linear_options
from lowtide.nn.quantized import QuantConv2d, QuantLinear
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.side_branch import SideBranch


class Packed(nn.Module):
    """What PackedLinear and PackedConv2d share: buffers with the shapes that the format gives.

    The shapes need no data, so a skeleton can hold the layer before a checkpoint fills it.
    """

    weight: Tensor
    bias: Tensor | None
    panels: Panels | None
    resident: ResidentWeight | None
    channels: int
    taps: int
    weight_dimensions: int
    format: WeightFormat
    input: Quantizer
    grid: Tensor
    places: tuple[PackedTable, ...]
    spec: list[int]
    # What the runtime sets: a faster product, which gives None where the operator has to run, and
    # the kernel of the latest run in words.
    product: Callable[[Tensor], Tensor | None] | None = None
    kernel: str = ""
    side: SideBranch | None  # a fused LoRA

    def forward(self, input: Tensor) -> Tensor:
        output = self.weighted(input)
        if self.side is None:
            return output
        return (output + self.side(input)).to(output.dtype)

    def weighted(self, input: Tensor) -> Tensor:
        """The answer of the packed weight, without the side branch."""
        raise NotImplementedError

    def fast_product(self, input: Tensor) -> Tensor | None:
        return None if self.product is None else self.product(input)

    def _allocate(self, columns: int, format: WeightFormat, inputs: Quantizer, smooth: int) -> None:
        """Allocate rows x columns of codes in this format, and divisors of `smooth` channels."""
        rows = self.weight.shape[0]
        self.format = format
        self.input = inputs
        self.panels = None
        self.resident = None
        self.register_module("side", None)
        form = inputs.format
        # Quantizers of these formats round by themselves, before the operator.
        bits = 0 if form is None or isinstance(form, Stepped | OwnRange) else form.bits
        self.spec = Spec(columns, format, bits).flat()
        codes = torch.empty(packed_shape(rows, columns, format), dtype=torch.uint8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.places = grid_places(rows, columns, format, smooth)
        self.register_buffer("grid", torch.empty(table_words(self.places), dtype=torch.int32))

    def fill(self, layer: QuantLinear | QuantConv2d) -> None:
        """Take the codes, the tables and the bias of a quantized layer."""
        packed = (
            pack_mixed(layer.codes, self.format.bits)
            if isinstance(self.format, Mixed)
            else pack(layer.codes, self.format.bits)
        )
        self.weight = nn.Parameter(packed, requires_grad=False)
        empty = layer.grid.scale.new_empty(0)
        factor = empty if layer.grid.factor is None else layer.grid.factor
        tables = (layer.grid.scale, layer.grid.zero, factor, layer.smooth)
        pairs = zip(tables, self.places, strict=True)
        stored = [table if place.count else empty for table, place in pairs]
        self.grid = pack_tables(stored, self.places)
        self.bias = layer.bias

    def rows_and_columns(self) -> torch.Size:
        """The shape of the weight as a matrix of values."""
        return torch.Size((self.places[0].shape[0], self.channels * self.taps))

    def rows(self) -> Rows:
        """What turns the codes of each output channel into int8 for the native kernels."""
        return rows_of_grid(self.tables(), Spec.of(self.spec))

    def hold_panels(self) -> Panels:
        """Hold the codes in the order of the native kernels from here on, and only so."""
        if self.panels is None:
            self.panels = arranged(self.weight, self.rows(), self.channels, self.taps)
            self.weight = nn.Parameter(self.panels.data, requires_grad=False)
        return self.panels

    def hold_resident(self) -> ResidentWeight:
        """Hold the codes in the order of the Triton kernels from here on, and only so."""
        if self.resident is None:
            spec = Spec.of(self.spec)
            fields = (self.codes(), self.tables(), spec, self.channels, self.taps)
            self.resident, data = in_one_buffer(resident_weight(*fields))
            self.panels = None
            self.weight = nn.Parameter(data, requires_grad=False)
        return self.resident

    def codes(self) -> Tensor:
        """The packed codes in the order of the checkpoint."""
        if self.resident is not None:
            return checkpoint_codes(self.resident, self.tables(), Spec.of(self.spec))
        if self.panels is None:
            return self.weight
        flat = restore(self.weight, self.tables(), self.spec, self.channels, self.taps)
        columns = self.channels * self.taps
        return flat.reshape(packed_shape(self.places[0].shape[0], columns, self.format))

    def hold_codes(self) -> None:
        """Hold the codes in the order of the checkpoint again."""
        if self.panels is not None or self.resident is not None:
            self.weight = nn.Parameter(self.codes(), requires_grad=False)
            self.panels = None
            self.resident = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy and a pickle hold: the codes in the order of the checkpoint."""
        state = dict(self.__dict__)
        if self.panels is not None or self.resident is not None:
            weight = nn.Parameter(self.codes(), requires_grad=False)
            state["_parameters"] = self._parameters | {"weight": weight}
        return state | {"panels": None, "resident": None, "product": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Moves to another device or type; the order of kernels stays on this one."""
        if fn(self.grid) is not self.grid:
            self.hold_codes()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(
        self,
        destination: dict[str, Any],
        prefix: str,
        keep_vars: bool,  # noqa: FBT001
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.panels is not None or self.resident is not None:
            destination[f"{prefix}weight"] = self.codes()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.hold_codes()
        super()._load_from_state_dict(*args, **kwargs)

    def tables(self) -> list[Tensor]:
        """scale, zero, factor, smooth; an empty tensor for a table that the layer does not have."""
        return unpack_tables(self.grid, self.places)

    def operands(self, input: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Of the operator: the input, the tables, and scale and zero of the input at this step.

        Scale and zero are missing for inputs in float, and for those that are rounded already.
        """
        tables = self.tables()
        if self.input.format is None or not self.input.enabled:
            return input, tables, []
        if not isinstance(self.input.format, Stepped | OwnRange):
            return input, tables, list(self.input.step())
        *others, smooth = tables
        return self.input(self.smoothed(input)), [*others, smooth[:0]], []

    def smoothed(self, input: Tensor) -> Tensor:
        """What is rounded: the input, each channel of it divided by its value in `smooth`."""
        smooth = self.tables()[-1]
        return divide(input, smooth.reshape(-1, *[1] * (self.weight_dimensions - 2)))


def grid_places(
    rows: int, columns: int, format: WeightFormat, smooth: int
) -> tuple[PackedTable, ...]:
    """The tables in a layer's grid.

    They are scale, zero (unsigned formats), factor (grouped formats), and smooth (divided inputs).
    """
    groups = -(-columns // format.group) if format.group else 0
    scales = PackedTable((rows, 1), torch.float32)
    zeros = PackedTable((0,) if format.signed else (rows, 1), torch.uint8)
    factors = PackedTable((rows, groups) if groups else (0,), torch.uint8)
    return scales, zeros, factors, PackedTable((smooth,), torch.float32)


def packed_shape(rows: int, columns: int, format: WeightFormat) -> tuple[int, ...]:
    if isinstance(format, Mixed):
        return (sum(packed_bytes(columns, bits) for bits in format.bits),)
    return rows, packed_bytes(columns, format.bits)


class PackedLinear(Packed, nn.Linear):
    """A linear layer on packed codes."""

    def __init__(self, layer: nn.Linear, format: WeightFormat, inputs: Quantizer, *, smooth: bool):
        nn.Linear.__init__(self, **linear_options(layer))
        columns = self.in_features
        self.channels = columns
        self.taps = 1
        self.weight_dimensions = 2
        self._allocate(columns, format, inputs, columns if smooth else 0)

    def weighted(self, input: Tensor) -> Tensor:
        output = self.fast_product(input)
        if output is not None:
            return output
        input, tables, step = self.operands(input)
        return linear(input, self.codes(), tables, step, self.spec, self.bias)


class PackedConv2d(Packed, nn.Conv2d):
    """A convolution on packed codes."""

    def __init__(self, layer: nn.Conv2d, format: WeightFormat, inputs: Quantizer, *, smooth: bool):
        nn.Conv2d.__init__(self, **conv_options(layer))
        self.shape = [*self.kernel_size, *self.stride, *self.padding, *self.dilation, self.groups]
        self.weight_dimensions = 4
        self.channels = self.in_channels // self.groups
        self.taps = self.kernel_size[0] * self.kernel_size[1]
        columns = self.channels * self.taps
        self._allocate(columns, format, inputs, self.in_channels if smooth else 0)

    def weighted(self, input: Tensor) -> Tensor:
        output = self.fast_product(input)
        if output is not None:
            return output
        input, tables, step = self.operands(input)
        return conv2d(input, self.codes(), tables, step, self.spec, self.bias, self.shape)


def packed_layer(
    layer: FloatLayer, format: WeightFormat, inputs: Quantizer, *, smooth: bool
) -> PackedLinear | PackedConv2d:
    """An empty packed layer in the shape of a Linear or Conv2d."""
    if isinstance(layer, nn.Conv2d):
        return PackedConv2d(layer, format, inputs, smooth=smooth)
    return PackedLinear(layer, format, inputs, smooth=smooth)


def packed_twin(layer: QuantLinear | QuantConv2d) -> PackedLinear | PackedConv2d:
    """The packed layer with the codes of a quantized layer."""
    assert layer.format is not None, "a layer in float has no codes"
    layer.input.enabled = True
    twin = packed_layer(layer, layer.format, layer.input, smooth=layer.smooth.numel() > 0)
    twin.fill(layer)
    return twin.train(layer.training)
