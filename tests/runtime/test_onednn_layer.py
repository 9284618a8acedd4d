"""A packed layer on oneDNN against its operator, which unpacks the weight at every call."""

import pytest
import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Mixed, WeightFormat, mse
from lowtide.kernels import onednn
from lowtide.nn.clock import Clock
from lowtide.nn.packed import PackedConv2d, PackedLinear, packed_twin
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer, input_format
from lowtide.runtime import onednn_layer
from lowtide.runtime.onednn_layer import OneDnnLayer, on_onednn

pytestmark = pytest.mark.skipif(onednn.unsupported() != "", reason=onednn.unsupported())

LAYERS = {
    "linear": (lambda: nn.Linear(37, 12), (4, 37)),
    "sequence": (lambda: nn.Linear(40, 12, bias=False), (3, 5, 40)),
    "conv": (lambda: nn.Conv2d(9, 12, 3, padding=1), (2, 9, 6, 6)),
    "without bias": (lambda: nn.Conv2d(8, 12, 3, bias=False), (2, 8, 6, 7)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=(2, 1)), (1, 8, 7, 6)),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, padding=2, dilation=2), (2, 8, 7, 6)),
    "grouped": (lambda: nn.Conv2d(9, 12, 3, padding=1, groups=3), (2, 9, 6, 6)),
    "one pixel": (lambda: nn.Conv2d(5, 12, 1, padding=1), (2, 5, 6, 6)),
}
FORMATS = [
    *(Affine(bits, signed=True, axis=0) for bits in (1, 3, 4, 8)),
    Affine(5, axis=0),
    Affine(4, signed=True, axis=0, group=16),
    Mixed((2, 3, 8) * 4),
]


def built(
    kind: str, format: WeightFormat, smooth: Tensor | None = None
) -> tuple[PackedLinear | PackedConv2d, Tensor, Clock]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(shape)
    clock = Clock((900, 500, 100), rows=1, per_step=True)
    quantizer = Quantizer(input_format(8), clock, per_step=True)
    quantized = quantized_layer(layer, format, quantizer)
    if smooth is not None:
        quantized.smooth = smooth
    low, high = mse(quantized.format.rows(quantized.weight.detach()), format)
    quantized.set_grid(format.params(low, high, quantized.weight.shape[0]))
    quantizer.fit(torch.tensor([-2.0, -0.5, 0.0]), torch.tensor([3.0, 2.0, 1.0]))
    clock.set(900)
    return packed_twin(quantized), x, clock


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
@torch.no_grad()
def test_every_step_agrees_with_the_operator(kind, format):
    layer, x, clock = built(kind, format)
    product = OneDnnLayer(layer)
    for timestep in (900, 500, 100):
        clock.set(timestep)
        expected = layer(x)
        found = product(x)
        assert found is not None
        assert found.shape == expected.shape
        assert (found - expected).norm() < 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_divided_inputs(kind):
    channels = LAYERS[kind][1][1]
    layer, x, _ = built(kind, FORMATS[2], torch.rand(channels) + 0.5)
    found = OneDnnLayer(layer)(x)
    assert found is not None
    expected = layer(x)
    assert (found - expected).norm() < 1e-6 * expected.norm()


@torch.no_grad()
def test_a_layer_runs_on_onednn_within_the_context_alone():
    layer, x, _ = built("conv", FORMATS[2])
    product = OneDnnLayer(layer)
    before = layer(x)
    with on_onednn({layer: product}):
        assert torch.equal(layer(x), product(x))
    assert layer.product is None
    assert torch.equal(layer(x), before)
    with pytest.raises(RuntimeError), on_onednn({layer: product}):
        layer(x[:, :3])
    assert layer.product is None


@torch.no_grad()
def test_what_only_the_operator_answers():
    layer, x, clock = built("conv", FORMATS[2])
    product = OneDnnLayer(layer)
    broken = x.clone()
    broken[0, 0, 0, 0] = float("nan")
    assert product(broken) is None
    assert product(x.half()) is None
    assert product(x[:0]) is None
    clock.set(torch.tensor([900, 100]))
    assert product(x) is None
    with on_onednn({layer: product}):
        assert layer(x).shape == (2, 12, 6, 6)


@torch.no_grad()
def test_infinity_is_the_last_code():
    layer, x, _ = built("linear", FORMATS[2])
    x[0, 0] = float("inf")
    found = OneDnnLayer(layer)(x)
    assert found is not None
    assert (found - layer(x)).norm() < 1e-6 * found.norm()


def test_reasons():
    assert onednn_layer.unsupported(built("grouped", FORMATS[2])[0]) == ""
    layer, _, _ = built("conv", FORMATS[2])
    layer.padding = "same"
    assert onednn_layer.unsupported(layer) == "its padding is same of zeros"
    wide, _, _ = built("conv", Affine(8, axis=0))
    assert onednn_layer.unsupported(wide) == "its weights do not fit in 8 bits"
    layer.input.format = None
    assert onednn_layer.unsupported(layer) == "its inputs are in float"
