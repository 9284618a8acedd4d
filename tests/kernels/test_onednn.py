"""Products of oneDNN: the integer part exact, whatever the shape, the batch and the zero point."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.formats import Affine
from lowtide.kernels import onednn
from lowtide.kernels.integers import IntegerWeight, integer_weight, rows_of
from lowtide.kernels.onednn import Geometry, onednn_weight, prepacked

pytestmark = pytest.mark.skipif(onednn.unsupported() != "", reason=onednn.unsupported())

LINEAR = [(1, 1), (5, 3), (37, 19), (64, 130), (384, 64)]
GEOMETRIES = [
    Geometry(kernel=(3, 3)),
    Geometry(kernel=(3, 3), stride=(2, 2)),
    Geometry(kernel=(1, 1), stride=(2, 1)),
    Geometry(kernel=(1, 3), stride=(1, 2)),
    Geometry(kernel=(3, 2), dilation=(2, 1)),
    Geometry(kernel=(3, 3), groups=3),
    Geometry(kernel=(1, 1), groups=3),
]
CHANNELS = [(3, 6), (9, 15), (33, 66)]
ZEROS = [0, 1, 128, 255]


def values(rows: int, taps: int, channels: int) -> Tensor:
    torch.manual_seed(rows + taps + channels)
    return torch.randint(-128, 128, (rows, taps, channels), dtype=torch.int8)


def random_codes(*shape: int) -> Tensor:
    torch.manual_seed(sum(shape))
    return torch.randint(256, shape, dtype=torch.uint8)


def sums(codes: Tensor, whole: Tensor, zero: int, geometry: Geometry) -> Tensor:
    """The exact sums, with channels last."""
    x = codes.permute(0, 3, 1, 2).double() - zero
    rows, _, channels = whole.shape
    weight = whole.double().transpose(1, 2).reshape(rows, channels, *geometry.kernel)
    _, stride, dilation, groups = geometry
    y = F.conv2d(x, weight, stride=stride, dilation=dilation, groups=groups)
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize(("channels", "rows"), LINEAR)
@pytest.mark.parametrize("zero", ZEROS)
def test_sums_of_linear_layers(batch, channels, rows, zero):
    whole = values(rows, 1, channels)
    codes = random_codes(batch, 3, channels)
    expected = (codes.double() - zero) @ whole[:, 0].double().T
    found = prepacked(whole, torch.ones(rows), None, Geometry()).product(codes, 1.0, zero)
    assert torch.equal(found.double(), expected)


@pytest.mark.parametrize("batch", [0, 1, 2, 3])
@pytest.mark.parametrize(("channels", "rows"), CHANNELS)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_sums_of_convolutions_at_every_zero_point(batch, channels, rows, geometry):
    """One weight, prepacked once, is right at the zero point of every step."""
    taps = geometry.kernel[0] * geometry.kernel[1]
    whole = values(rows, taps, channels // geometry.groups)
    codes = random_codes(batch, 7, 6, channels)
    weight = prepacked(whole, torch.ones(rows), None, geometry)
    for zero in ZEROS:
        found = weight.product(codes, 1.0, zero)
        assert torch.equal(found.double(), sums(codes, whole, zero, geometry))


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(kernel=(3, 3))], ids=str)
def test_the_largest_sums_are_rounded_to_float32_and_no_more(geometry):
    taps = geometry.kernel[0] * geometry.kernel[1]
    whole = torch.full((16, taps, 2048), 127, dtype=torch.int8)
    codes = torch.full((1, 4, 4, 2048), 255, dtype=torch.uint8)
    found = prepacked(whole, torch.ones(16), None, geometry).product(codes, 1.0, 7)
    expected = sums(codes, whole, 7, geometry)
    assert ((found.double() - expected).abs() <= 2**-23 * expected.abs()).all()


@pytest.mark.parametrize("geometry", [Geometry(), Geometry(kernel=(3, 3))], ids=str)
def test_scales_and_bias(geometry):
    taps = geometry.kernel[0] * geometry.kernel[1]
    whole = values(20, taps, 40)
    codes = random_codes(2, 6, 5, 40)
    scale = torch.rand(20) + 0.1
    bias = torch.randn(20)
    found = prepacked(whole, scale, bias, geometry).product(codes, 0.013, 77)
    expected = sums(codes, whole, 77, geometry) * 0.013 * scale.double() + bias.double()
    assert (found - expected).norm() < 3e-7 * expected.norm()


def integers(bits: int, channels: int, taps: int, *, group: int | None = None) -> IntegerWeight:
    torch.manual_seed(bits)
    format = Affine(bits, signed=True, axis=0, group=group)
    weight = torch.randn(8, channels * taps)
    rows = format.rows(weight)
    grid = format.params(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), 8)
    codes = torch.randint(2**bits, weight.shape, dtype=torch.uint8)
    return integer_weight(codes, rows_of(*grid, format), taps)


@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_weights_of_all_bits_with_channels_in_whole_dwords(bits):
    """The codes of a program end in channels of zero codes, which the weight has to skip."""
    whole = integers(bits, channels=5, taps=9)
    geometry = Geometry(kernel=(3, 3))
    codes = random_codes(2, 5, 5, 8)
    codes[..., 5:] = 0
    weight = onednn_weight(whole, None, geometry, channels=8)
    expected = sums(codes[..., :5], whole.values(), 3, geometry) * whole.scale.double()
    assert (weight.product(codes, 1.0, 3) - expected).norm() < 3e-7 * expected.norm()


def test_codes_need_not_be_contiguous():
    codes = random_codes(2, 6, 6, 12)[:, 1:, :, :9]
    geometry = Geometry(kernel=(3, 3))
    whole = values(4, 9, 9)
    found = prepacked(whole, torch.ones(4), None, geometry).product(codes, 1.0, 9)
    assert torch.equal(found.double(), sums(codes, whole, 9, geometry))


@pytest.fixture
def asked_again():
    onednn.unsupported.cache_clear()
    yield
    onednn.unsupported.cache_clear()


@pytest.mark.usefixtures("asked_again")
class TestUnsupported:
    def test_a_torch_without_the_operators(self, monkeypatch):
        monkeypatch.setattr(onednn, "_operators", SimpleNamespace)
        assert onednn.unsupported() == "this build of torch has no oneDNN for integers"

    def test_sums_that_saturate(self, monkeypatch):
        monkeypatch.setattr(onednn, "_is_exact", lambda geometry: geometry.is_linear)
        assert onednn.unsupported() == "oneDNN's sums of 8-bit products overflow on this CPU"

    def test_reference_loops(self, monkeypatch):
        monkeypatch.setattr(onednn, "SLOW", 0)
        assert "slow reference" in onednn.unsupported()

    def test_an_operator_that_refuses(self, monkeypatch):
        def refuse(geometry: Geometry) -> bool:
            raise RuntimeError("could not create a primitive\nand a trace")

        monkeypatch.setattr(onednn, "_is_exact", refuse)
        expected = "oneDNN refuses integers on this CPU (could not create a primitive)"
        assert onednn.unsupported() == expected
