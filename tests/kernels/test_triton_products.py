"""Triton products against the plain operators, which unpack the weight and multiply floats."""

import pytest
import torch
import torch.nn.functional as F
from triton_layers import (
    DEVICE,
    FORMATS,
    SCALES,
    STEP,
    ZEROS,
    Layer,
    current,
    distance,
    random_layer,
)

pytest.importorskip("triton", reason="triton is not installed")

from lowtide.formats import Affine, Mixed
from lowtide.kernels import conv2d, linear, native_library, quantize_input
from lowtide.kernels.triton.operands import Epilogue, StepTable, Window
from lowtide.kernels.triton.product_launches import multiply, multiply_floats, multiply_to_codes
from lowtide.kernels.triton.resident import ResidentWeight, resident_weight
from lowtide.kernels.triton.rounding_launches import round_images, round_tokens
from lowtide.kernels.triton.tiles import Choice, Tile

W4 = Affine(4, axis=0)
ACTIVATIONS = {
    native_library.SILU: F.silu,
    native_library.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    native_library.GELU_ERF: F.gelu,
}


def table(index=STEP, smooth=None, top=255) -> StepTable:
    running = torch.as_tensor(index, device=DEVICE)
    return StepTable(SCALES.to(DEVICE), ZEROS.to(DEVICE), running, top, smooth)


def resident(layer: Layer, channels: int, taps: int = 1) -> ResidentWeight:
    return resident_weight(layer.packed, layer.grid, layer.spec, channels, taps)


def plain(x: torch.Tensor, layer: Layer) -> torch.Tensor:
    return linear(x, layer.packed, layer.grid, current(), layer.spec.flat(), layer.bias)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_linear(form):
    torch.manual_seed(0)
    layer = random_layer(form, 21, 70)
    x = torch.randn(3, 7, 70, device=DEVICE)
    weight = resident(layer, 70)
    y = multiply(round_tokens(x, table(), weight.room), weight, Epilogue(layer.bias), x.dtype)
    assert distance(y.reshape(3, 7, 21), plain(x, layer)) < 1e-6


@pytest.mark.parametrize("form", [FORMATS[0], W4, FORMATS[4], FORMATS[-1]], ids=str)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [
        ((3, 3), (1, 1), (1, 1), (1, 1)),
        ((1, 1), (1, 1), (0, 0), (1, 1)),
        ((3, 3), (2, 2), (1, 1), (1, 1)),
        ((2, 3), (2, 1), (0, 2), (1, 2)),
        ((1, 1), (2, 2), (1, 0), (1, 1)),
    ],
)
def test_conv2d(form, kernel, stride, padding, dilation):
    torch.manual_seed(0)
    taps = kernel[0] * kernel[1]
    layer = random_layer(form, 10, 6 * taps)
    x = torch.randn(2, 6, 5, 7, device=DEVICE)
    weight = resident(layer, 6, taps)
    codes = round_images(x, table(), weight.room, padding)
    window = Window(kernel, stride, dilation)
    y = multiply(codes, weight, Epilogue(layer.bias), x.dtype, window).permute(0, 3, 1, 2)
    shape = [*kernel, *stride, *padding, *dilation, 1]
    tables = (layer.packed, layer.grid, current(), layer.spec.flat(), layer.bias)
    expected = conv2d(x, *tables, shape)
    assert y.shape == expected.shape
    assert distance(y, expected) < 1e-6


def test_a_long_sum_in_tiles_of_every_kind():
    """More than one tile down and across, k in several steps, whole and in parts."""
    torch.manual_seed(0)
    layer = random_layer(W4, 37, 512)
    x = torch.randn(41, 512, device=DEVICE)
    weight = resident(layer, 512)
    codes = round_tokens(x, table(), weight.room)
    late = Epilogue(layer.bias, activation=native_library.SILU)
    choices = [Choice(Tile(16, 32, 64, 4, 2), split) for split in (1, 3, 4)]
    whole, *parts = [multiply(codes, weight, late, x.dtype, choice=each) for each in choices]
    assert distance(whole.reshape(41, 37), F.silu(plain(x, layer))) < 1e-6
    # Integers add exactly in any order.
    assert all(torch.equal(part, whole) for part in parts)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_whole_epilogue(activation):
    torch.manual_seed(0)
    layer = random_layer(W4, 18, 40)
    x = torch.randn(3, 5, 40, device=DEVICE)
    vector = torch.randn(3, 18, device=DEVICE)
    gate = torch.randn(1, 18, device=DEVICE)
    residual = torch.randn(1, 15, 1, 18, device=DEVICE)
    weight = resident(layer, 40)
    codes = round_tokens(x, table(), weight.room)
    # Tokens lie as one sample of 15 rows; the vectors want three samples of five.
    by_sample = codes_by_sample(codes, 3)
    late = Epilogue(layer.bias, vector, activation, gate, residual.reshape(3, 5, 1, 18), 0.7)
    y = multiply(by_sample, weight, late, x.dtype).reshape(3, 5, 18)
    inner = ACTIVATIONS[activation](plain(x, layer) + vector[:, None])
    expected = (inner * gate + residual.reshape(3, 5, 18)) * 0.7
    assert distance(y, expected) < 1e-6


def codes_by_sample(codes, samples):
    shape = (samples, -1, 1)
    data = codes.data.reshape(*shape, codes.data.shape[-1])
    return type(codes)(data, codes.sums.reshape(shape), codes.channels, codes.table)


@pytest.mark.parametrize("form", [FORMATS[0], W4, Mixed((8, 2, 4), signed=False)], ids=str)
@pytest.mark.parametrize("split", [1, 2])
def test_the_output_as_codes_of_the_next_layer(form, split):
    torch.manual_seed(0)
    layer = random_layer(form, 40, 256)
    x = torch.randn(19, 256, device=DEVICE)
    weight = resident(layer, 256)
    smooth = torch.rand(40, device=DEVICE) + 0.5
    output = plain(x, layer) / smooth
    scales = output.abs().max() / torch.tensor([70.0, 100.0, 130.0], device=DEVICE)
    following = StepTable(scales, ZEROS.to(DEVICE), table().index, 255, smooth)
    codes = round_tokens(x, table(), weight.room)
    choice = Choice(Tile(16, 16, 128, 4, 2), split)
    rounded = multiply_to_codes(codes, weight, Epilogue(layer.bias), following, 64, choice=choice)
    scaled = output / scales[STEP]
    expected = (scaled.round() + 117).clamp(0, 255) - 128
    found = rounded.data.reshape(19, 64)
    # float32 sums in another order may turn a value that lies at a tie.
    near = (scaled % 1 - 0.5).abs() < 1e-5 * scaled.abs().clamp(min=1)
    assert torch.equal(found[:, :40][~near], expected.to(torch.int8)[~near])
    assert near.float().mean() < 0.01
    assert (found[:, 40:] == 0).all()
    assert torch.equal(rounded.sums.flatten(), found.sum(1).float())


@pytest.mark.parametrize("kind", ["linear", "image"])
def test_every_sample_at_its_own_step(kind):
    torch.manual_seed(0)
    layer = random_layer(W4, 12, 6 if kind == "image" else 40)
    index = torch.tensor([2, 0, 1], device=DEVICE)
    running = table(index)
    steps = [SCALES.to(DEVICE)[index], ZEROS.to(DEVICE)[index]]
    tables = (layer.packed, layer.grid, steps, layer.spec.flat(), layer.bias)
    if kind == "image":
        x = torch.randn(3, 6, 4, 3, device=DEVICE)
        weight = resident(layer, 6)
        codes = round_images(x, running, weight.room, (1, 0))
        y = multiply(codes, weight, Epilogue(layer.bias), x.dtype).permute(0, 3, 1, 2)
        expected = conv2d(x, *tables, [1, 1, 1, 1, 1, 0, 1, 1, 1])
    else:
        # Six rows for three steps: attention folds its heads into the batch.
        x = torch.randn(6, 5, 40, device=DEVICE)
        weight = resident(layer, 40)
        codes = round_tokens(x, running, weight.room)
        y = multiply(codes, weight, Epilogue(layer.bias), x.dtype).reshape(6, 5, 12)
        expected = linear(x, *tables)
    assert distance(y, expected) < 1e-6


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float16, 6e-4)])
def test_inputs_in_float(form, dtype, bound):
    """The plain operator also rounds the values of the weight to this type."""
    torch.manual_seed(0)
    layer = random_layer(form, 21, 70)
    x = torch.randn(3, 7, 140, device=DEVICE, dtype=dtype)[..., ::2]
    y = multiply_floats(x, resident(layer, 70), layer.bias)
    tables = (layer.packed, layer.grid, [], layer.spec.flat(), layer.bias)
    assert y.dtype == dtype
    assert distance(y, linear(x.float(), *tables)) < bound


def test_inputs_of_fewer_bits():
    torch.manual_seed(0)
    layer = random_layer(W4, 12, 40, input_bits=4)
    x = torch.randn(9, 40, device=DEVICE)
    zeros = torch.tensor([3, 7, 5], dtype=torch.uint8, device=DEVICE)
    scales = torch.tensor([0.1, 0.3, 0.2], device=DEVICE)
    running = StepTable(scales, zeros, table().index, 15)
    weight = resident(layer, 40)
    y = multiply(round_tokens(x, running, weight.room), weight, Epilogue(layer.bias), x.dtype)
    steps = [scales[STEP], zeros[STEP]]
    expected = linear(x, layer.packed, layer.grid, steps, layer.spec.flat(), layer.bias)
    assert distance(y.reshape(9, 12), expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Codes as of the plain rounding; the output is rounded once, from float32.

    The interpreter cuts bf16 numbers off, so the bound is a whole last digit.
    """
    torch.manual_seed(0)
    layer = random_layer(W4, 12, 40)
    x = torch.randn(9, 40, device=DEVICE, dtype=dtype)
    weight = resident(layer, 40)
    y = multiply(round_tokens(x, table(), weight.room), weight, Epilogue(layer.bias), dtype)
    rounded = quantize_input(x.float(), *current(), 255)
    expected = linear(rounded, layer.packed, layer.grid, [], layer.spec.flat(), layer.bias)
    assert y.dtype == dtype
    assert distance(y.reshape(9, 12), expected) < torch.finfo(dtype).eps


def test_a_value_that_is_not_a_number_spoils_what_reads_it():
    layer = random_layer(W4, 5, 6 * 9)
    x = torch.randn(1, 6, 5, 6, device=DEVICE)
    x[0, 2, 4, 1] = float("nan")
    weight = resident(layer, 6, 9)
    codes = round_images(x, table(), weight.room, (1, 1))
    y = multiply(codes, weight, Epilogue(layer.bias), x.dtype, Window((3, 3)))
    strange = torch.zeros(5, 6, dtype=torch.bool, device=DEVICE)
    strange[3:, :3] = True
    assert torch.equal(y[0].isnan(), strange[..., None].expand(-1, -1, 5))


def test_no_rows():
    layer = random_layer(W4, 5, 40)
    weight = resident(layer, 40)
    x = torch.empty(0, 40, device=DEVICE)
    codes = round_tokens(x, table(), weight.room)
    assert multiply(codes, weight, Epilogue(), x.dtype).shape == (1, 0, 1, 5)
    assert multiply_floats(x.half(), weight, None).shape == (0, 5)
    image = torch.empty(0, 40, 3, 3, device=DEVICE)
    assert multiply(
        round_images(image, table(), weight.room), weight, Epilogue(), x.dtype
    ).shape == (0, 3, 3, 5)
