"""Gated units in one product, against the product in float32 and a Stream behind it."""

import pytest
import torch
from native_programs import Memory, Steps, code_sink, float_sink, generator, relative, sinks
from test_native_gemm import ACTIVATIONS, Layer, random_weight
from test_native_stream import stream
from torch import Tensor

from lowtide.formats import Affine, Mixed
from lowtide.kernels import divide
from lowtide.kernels.native_library import GELU_ERF, NOT_A_NUMBER, Sink
from lowtide.kernels.panels import panels

FORMATS = [
    Affine(4, signed=True, axis=0),
    Affine(8, signed=True, axis=0),
    Affine(3, axis=0),
    Affine(4, signed=True, axis=0, group=16),
    Mixed((2, 3, 4, 8) * 32),
]


def tokens(format: object, channels: int, k: int, shape: tuple[int, int, int], *seeds) -> Layer:
    """A linear layer of twice `channels` columns on codes (batch, height, width, k)."""
    random = generator(str(format), channels, k, *seeds)
    if isinstance(format, Mixed):
        format = Mixed(format.bits * (2 * channels // len(format.bits)))
    weight = random_weight(format, 2 * channels, k, 1, random)
    x = torch.randint(256, (*shape, -(-k // 4) * 4), generator=random, dtype=torch.uint8)
    x[..., k:] = 0
    return Layer(x, 117, weight, k, (1, 1), 1)


def unit_scale(layer: Layer) -> float:
    """The scale of the input at which the product has a deviation of 2."""
    return float(2 / (layer.sums() * layer.weight.scale).std())


def in_two_steps(
    machine, at: Memory, layer: Layer, fields: dict, activation: int, sink: Sink
) -> tuple[Tensor, Tensor]:
    """The codes by a product in float32 and a Stream; returns the values, and the product."""
    columns = len(layer.weight.scale)
    product = torch.full((*layer.output, columns), float("nan"))
    gemm = layer.gemm(at, panels(layer.weight), sink=float_sink(at, product), **fields)
    hidden, gate = product.chunk(2, -1)
    y = torch.full(hidden.shape, float("nan"))
    strides = dict(zip(("t_sample", "t_row", "t_column"), hidden.stride(), strict=False))
    gated = {"times": at(hidden), "activation": activation, **strides}
    stores = sinks(float_sink(at, y), sink)
    assert machine.run(gemm, stream(at, (gate,), **gated, **stores)) == 0
    return y, product


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_product_gives_the_codes_of_two_steps(machine, format, activation):
    steps = Steps(0.05, 119)
    for channels, k, shape in [(64, 30, (2, 3, 5)), (128, 70, (1, 1, 100)), (320, 33, (1, 2, 2))]:
        layer = tokens(format, channels, k, shape)
        at = Memory()
        bias = torch.randn(2 * channels, generator=generator(channels))
        fields = {"bias": at(bias), "x_scale": unit_scale(layer)}
        expected = torch.full((*layer.output, channels), 7, dtype=torch.uint8)
        sink = code_sink(at, expected, steps)
        y, product = in_two_steps(machine, at, layer, fields, activation, sink)
        hidden, gate = product.double().chunk(2, -1)
        assert relative(y, hidden * ACTIVATIONS[activation](gate)) < 1e-6
        found = torch.full_like(expected, 7)
        values = torch.full_like(y, float("nan"))
        fields |= {"activation": activation, "gated": 1}
        weight = panels(layer.weight)
        in_codes = layer.gemm(at, weight, sink=code_sink(at, found, steps), **fields)
        in_float = layer.gemm(at, weight, sink=float_sink(at, values), **fields)
        assert machine.run(in_codes, in_float) == 0
        assert torch.equal(found, expected)
        assert torch.equal(values, y)


def test_divisors_and_channels_after_the_last_one(machine):
    layer = tokens(FORMATS[0], 64, 40, (2, 1, 9), "divisors")
    at = Memory()
    smooth = torch.rand(64, generator=generator("smooth")) + 0.2
    steps = Steps(0.05, 119)
    found = torch.full((*layer.output, 64), 7, dtype=torch.uint8)
    fields = {"x_scale": unit_scale(layer), "activation": GELU_ERF, "gated": 1}
    weight = panels(layer.weight)
    y = torch.full((*layer.output, 64), float("nan"))
    in_float = layer.gemm(at, weight, sink=float_sink(at, y), **fields)
    sink = code_sink(at, found, steps, smooth=smooth)
    assert machine.run(in_float, layer.gemm(at, weight, sink=sink, **fields)) == 0
    assert torch.equal(found.float(), steps.codes(divide(y, smooth)))


@pytest.mark.parametrize("column", [3, 70])
def test_a_bias_that_is_not_a_number_is_reported(machine, column):
    """In either half."""
    layer = tokens(FORMATS[0], 64, 40, (1, 1, 9), "nan")
    bias = torch.zeros(128)
    bias[column] = float("nan")
    at = Memory()
    codes = torch.zeros(*layer.output, 64, dtype=torch.uint8)
    sink = code_sink(at, codes, Steps(0.1, 3))
    fields = {"x_scale": 0.01, "bias": at(bias), "activation": GELU_ERF, "gated": 1}
    assert machine.run(layer.gemm(at, panels(layer.weight), sink=sink, **fields)) == NOT_A_NUMBER
