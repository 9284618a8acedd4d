"""Products of the native kernels: sums bit for bit, the epilogue, and the codes that they store."""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from native_programs import Memory, Steps, code_sink, float_sink, generator, pick, relative
from torch import Tensor

from lowtide.formats import Affine, Mixed, WeightFormat
from lowtide.kernels import divide
from lowtide.kernels.integers import IntegerWeight, Rows, integer_weight, rows_of
from lowtide.kernels.native_library import GELU_ERF, GELU_TANH, IDENTITY, SILU, Gemm
from lowtide.kernels.panels import Panels, panels

FORMATS = [
    *(Affine(bits, signed=True, axis=0) for bits in range(1, 9)),
    *(Affine(bits, axis=0) for bits in range(1, 8)),
    *(Affine(bits, signed=True, axis=0, group=8) for bits in range(2, 8)),
    *(Affine(bits, axis=0, group=5) for bits in range(2, 7)),
]
MIXED = [(1, 2, 3, 4, 5, 6, 7, 8), (4, 2), (8, 4), (1, 8), (3, 5, 7)]
ACTIVATIONS = {
    IDENTITY: lambda x: x,
    SILU: F.silu,
    GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    GELU_ERF: F.gelu,
}


@dataclass
class Layer:
    """A convolution on codes or float32, drawn at random: its input, weight and geometry."""

    x: Tensor  # (batch, height, width, channels up to a multiple of four), with its padding
    zero: int
    weight: IntegerWeight
    channels: int
    kernel: tuple[int, int]
    stride: int

    @property
    def output(self) -> tuple[int, int, int]:
        """Batch, height and width."""
        batch, height, width, _ = self.x.shape
        down = (height - self.kernel[0]) // self.stride + 1
        across = (width - self.kernel[1]) // self.stride + 1
        return batch, down, across

    def sums(self) -> Tensor:
        """The exact product, (batch, height, width, rows), in float64."""
        return self.product(self.x.double() - self.zero, self.weight.values().double())

    def sizes(self) -> Tensor:
        """The same of all absolute values."""
        return self.product(self.x.double().abs(), self.weight.values().double().abs())

    def product(self, x: Tensor, values: Tensor) -> Tensor:
        x = x[..., : self.channels].permute(0, 3, 1, 2)
        values = values.transpose(1, 2)
        values = values.reshape(len(values), self.channels, *self.kernel)
        return F.conv2d(x, values, stride=self.stride).permute(0, 2, 3, 1)

    def gemm(self, at: Memory, weight: Panels, x_scale: float | None, **fields: object) -> Gemm:
        """The call; without a scale of the input, the input is float32."""
        batch, height, width = self.output
        sample, row, column, _ = (self.x.element_size() * each for each in self.x.stride())
        offsets = [[down * row + across * column for across in range(self.kernel[1])]
                   for down in range(self.kernel[0])]  # fmt: skip
        taps = torch.tensor(offsets).flatten()
        at.tensors += [weight.data, weight.panel, weight.masks, weight.shifts]
        at.tensors += [weight.zeros, weight.scale, weight.sums, weight.factors, weight.groups]
        return Gemm(
            x=at(self.x),
            batch=batch,
            height=height,
            width=width,
            x_sample=sample,
            x_row=row * self.stride,
            x_column=column * self.stride,
            taps=at(taps),
            tap_count=len(taps),
            tap_k4=-(-self.channels // 4),
            x_scale=None if x_scale is None else at.number(x_scale),
            x_zero=at.number(self.zero),
            weight=weight.structure,
            **{"factor": 1.0, **fields},
        )


def random_weight(
    format: WeightFormat, rows: int, channels: int, taps: int, random: torch.Generator
) -> IntegerWeight:
    """Codes from the first to the last one that is an int8, with the grid of random ranges."""
    bits = format.bits if isinstance(format, Mixed) else (format.bits,) * rows
    tops = torch.tensor([[2**each for each in bits]]).T
    columns = channels * taps
    codes = (torch.rand(rows, columns, generator=random) * tops).floor().to(torch.uint8)
    ranges = format.rows(torch.randn(rows, columns, generator=random))
    grid = format.params(ranges.amin(1, keepdim=True), ranges.amax(1, keepdim=True), rows)
    of_rows = rows_of(*grid, format)
    if of_rows.factor is not None:
        most = 127 // of_rows.factor.repeat_interleave(of_rows.group, 1)[:, :columns].int()
        zero = of_rows.zero[:, None]
        codes = torch.minimum(torch.maximum(codes.int(), zero - most), zero + most)
    return integer_weight(codes.to(torch.uint8), of_rows, taps)


def random_layer(format: WeightFormat, rows: int, random: torch.Generator) -> Layer:
    channels = pick((1, 3, 4, 5, 16, 30, 33), random)
    kernel = pick(((1, 1), (3, 3), (1, 3), (2, 1)), random)
    batch = pick((1, 2, 3), random)
    height = kernel[0] + pick(range(8), random)
    width = kernel[1] + pick(range(8), random)
    zero = pick((0, 1, 117, 255), random)
    padded = -(-channels // 4) * 4
    x = torch.zeros(batch, height, width, padded, dtype=torch.uint8)
    shape = (batch, height, width, channels)
    x[..., :channels] = torch.randint(256, shape, generator=random, dtype=torch.uint8)
    x[:, : pick((0, 1), random)] = zero  # padding, as a sink fills it
    x[:, :, width - pick((0, 1, 2), random) :] = zero
    x[..., channels:] = 0
    weight = random_weight(format, rows, channels, kernel[0] * kernel[1], random)
    return Layer(x, zero, weight, channels, kernel, pick((1, 2), random))


def unscaled(weight: IntegerWeight) -> IntegerWeight:
    """The same integers with scales of one."""
    return replace(weight, rows=replace(weight.rows, scale=torch.ones(len(weight.scale))))


def check_sums(machine, layer: Layer) -> None:
    """With an epilogue that does nothing, the result is the sum, rounded once to float32."""
    at = Memory()
    weight = panels(unscaled(layer.weight))
    y = torch.full((*layer.output, weight.columns), float("nan"))
    outcome = machine.run(layer.gemm(at, weight, 1.0, sink=float_sink(at, y)))
    assert outcome == 0
    assert torch.equal(y, layer.sums().float())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_sums_are_exact(machine, format):
    random = generator(str(format))
    for rows in (pick(range(1, 20), random), pick(range(20, 201), random)):
        check_sums(machine, random_layer(format, rows, random))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", MIXED, ids=str)
def test_sums_of_mixed_bits_are_exact(machine, bits, signed):
    random = generator(bits, signed)
    rows = pick(range(1, 201), random)
    of_rows = tuple(pick(bits, random) for _ in range(rows))
    check_sums(machine, random_layer(Mixed(of_rows, signed=signed), rows, random))


@pytest.mark.parametrize("rows", [1, 3, 17, 64, 130])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_float_inputs(machine, format, rows):
    """Products of float32 values, within the rounding of a sum of their size."""
    random = generator(str(format), rows)
    layer = random_layer(format, rows, random)
    layer.x = torch.randn(layer.x.shape, generator=random)
    layer.x[..., layer.channels :] = 0
    layer.zero = 0
    at = Memory()
    weight = panels(layer.weight)
    y = torch.full((*layer.output, rows), float("nan"))
    outcome = machine.run(layer.gemm(at, weight, None, sink=float_sink(at, y)))
    assert outcome == 0
    expected = layer.sums() * layer.weight.scale
    bound = 1e-6 * layer.sizes() * layer.weight.scale
    assert ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 48, 63, 64, 65, 128, 200])
def test_any_number_of_rows_and_pixels(machine, rows):
    for pixels in (1, 2, 3, 4, 5, 6, 7, 100):
        random = generator(rows, pixels)
        layer = random_layer(Affine(4, axis=0), rows, random)
        x = torch.randint(256, (1, 1, pixels, 8), generator=random, dtype=torch.uint8)
        weight = random_weight(Affine(4, axis=0), rows, 8, 1, random)
        check_sums(machine, replace(layer, x=x, weight=weight, channels=8, kernel=(1, 1), stride=1))


@pytest.mark.parametrize("value", [127, -127, -128])
def test_extreme_codes_do_not_saturate(machine, value):
    """vpmaddubsw would clip 255 * 127 + 255 * 127 to 32767."""
    rows = 20
    channels = 4100
    codes = torch.full((rows, 1, channels), value + 128, dtype=torch.uint8)
    zero = torch.full((rows,), 128, dtype=torch.int32)
    bits = torch.full((rows,), 8, dtype=torch.int32)
    of_rows = Rows(bits, torch.zeros(rows), zero, torch.ones(rows))
    weight = IntegerWeight(codes, of_rows)
    x = torch.full((1, 1, 7, channels), 255, dtype=torch.uint8)
    layer = Layer(x, 0, weight, channels, (1, 1), 1)
    assert layer.sums().unique().tolist() == [255 * value * channels]
    check_sums(machine, layer)


def epilogue(
    layer: Layer, parts: dict[str, Tensor], activation: int, factor: float, x_scale: float
) -> Tensor:
    """The plain epilogue in float64."""
    value = layer.sums() * (layer.weight.scale.double() * x_scale)
    value = value + parts.get("bias", torch.zeros(()))
    if "per_sample" in parts:
        value = value + parts["per_sample"][:, None, None]
    value = ACTIVATIONS[activation](value)
    if "gate" in parts:
        value = value * parts["gate"][:, None, None]
    if "residual" in parts:
        value = value + parts["residual"]
    return value * factor


def random_parts(names: set[str], layer: Layer, random: torch.Generator) -> dict[str, Tensor]:
    batch, height, width = layer.output
    rows = len(layer.weight.scale)
    shapes = {
        "bias": (rows,),
        "per_sample": (batch, rows),
        "gate": (batch, rows),
        "residual": (batch, height, width, rows),
    }
    return {name: torch.randn(shapes[name], generator=random) for name in sorted(names)}


def fields_of(parts: dict[str, Tensor], at: Memory) -> dict[str, int | None]:
    fields = {name: at(part) for name, part in parts.items()}
    for name in parts.keys() & {"per_sample", "gate"}:
        fields[f"{name}_stride"] = parts[name].stride(0)
    if "residual" in parts:
        strides = zip(("r_sample", "r_row", "r_column"), parts["residual"].stride(), strict=False)
        fields |= dict(strides)
    return fields


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "names",
    [set(), {"bias"}, {"per_sample"}, {"gate"}, {"residual"}, {"bias", "gate", "residual"},
     {"bias", "per_sample", "gate", "residual"}],
    ids=lambda names: "+".join(sorted(names)) or "nothing",
)  # fmt: skip
def test_epilogue(machine, names, activation):
    """Within 1e-6 in float32; and codes are the plain rounding of those very values."""
    random = generator(names and sorted(names), activation)
    rows = pick(range(1, 150), random)
    layer = random_layer(Affine(pick((3, 4, 8), random), signed=True, axis=0), rows, random)
    parts = random_parts(names, layer, random)
    factor = pick((1.0, 0.7071), random)
    sums = layer.sums() * layer.weight.scale
    x_scale = float((1.5 / sums.std(correction=0).clamp(min=1e-3)).float())
    at = Memory()
    y = torch.full((*layer.output, rows), float("nan"))
    steps = Steps(scale=0.0371, zero=101)
    padded = -(-rows // 4) * 4
    codes = torch.full((*layer.output, padded), 7, dtype=torch.uint8)
    weight = panels(layer.weight)
    fields = {"activation": activation, "factor": factor, **fields_of(parts, at)}
    in_float = layer.gemm(at, weight, x_scale, sink=float_sink(at, y), **fields)
    in_codes = layer.gemm(at, weight, x_scale, sink=code_sink(at, codes, steps), **fields)
    smooth = torch.rand(rows, generator=random) + 0.1
    divided = torch.full_like(codes, 7)
    sink = code_sink(at, divided, steps, smooth=smooth)
    in_smooth_codes = layer.gemm(at, weight, x_scale, sink=sink, **fields)
    assert machine.run(in_float, in_codes, in_smooth_codes) == 0
    assert relative(y, epilogue(layer, parts, activation, factor, x_scale)) < 1e-6
    assert torch.equal(codes[..., :rows].float(), steps.codes(y))
    assert torch.equal(divided[..., :rows].float(), steps.codes(divide(y, smooth)))
    assert not codes[..., rows:].any()
    assert not divided[..., rows:].any()


def test_groups_are_slices_of_input_and_output(machine):
    random = generator("groups")
    groups = 3
    rows = 10
    channels = 8
    x = torch.randint(256, (2, 5, 6, groups * channels), generator=random, dtype=torch.uint8)
    y = torch.full((2, 5, 6, groups * rows), float("nan"))
    at = Memory()
    gemms = []
    expected = []
    for group in range(groups):
        part = x[..., group * channels : (group + 1) * channels]
        weight = random_weight(Affine(5, axis=0), rows, channels, 1, random)
        layer = Layer(part, 9, unscaled(weight), channels, (1, 1), 1)
        sink = float_sink(at, y[..., group * rows : (group + 1) * rows])
        gemms.append(layer.gemm(at, panels(layer.weight), 1.0, sink=sink))
        expected.append(layer.sums())
    assert machine.run(*gemms) == 0
    assert torch.equal(y, torch.cat(expected, -1).float())


def test_a_sink_leaves_room_for_padding(machine):
    random = generator("room")
    layer = random_layer(Affine(4, axis=0), 21, random)
    batch, height, width = layer.output
    steps = Steps(scale=300.0, zero=128)
    at = Memory()
    y = torch.full((*layer.output, 21), float("nan"))
    codes = torch.full((batch, height + 3, width + 3, 24), 7, dtype=torch.uint8)
    weight = panels(unscaled(layer.weight))
    room = code_sink(at, codes, steps, above=1, left=2, below=2, right=1)
    plain = layer.gemm(at, weight, 1.0, sink=float_sink(at, y))
    assert machine.run(plain, layer.gemm(at, weight, 1.0, sink=room)) == 0
    inside = codes[:, 1 : 1 + height, 2 : 2 + width]
    assert torch.equal(inside[..., :21].float(), steps.codes(y))
    inside.fill_(7)
    assert codes.unique().tolist() == [7]


def test_a_bias_that_is_not_a_number_is_reported(machine):
    random = generator("nan")
    layer = random_layer(Affine(4, axis=0), 5, random)
    bias = torch.tensor([0.0, float("nan"), 0.0, 0.0, 0.0])
    codes = torch.zeros(*layer.output, 8, dtype=torch.uint8)
    at = Memory()
    sink = code_sink(at, codes, Steps(scale=0.1, zero=3))
    gemm = layer.gemm(at, panels(layer.weight), 1.0, sink=sink, bias=at(bias))
    assert machine.run(gemm) == 1
