"""Rounding in Triton, alone and after a norm, against torch's norms and the plain rounding."""

import pytest
import torch
import torch.nn.functional as F
from triton_layers import DEVICE, SCALES, STEP, ZEROS, current

pytest.importorskip("triton", reason="triton is not installed")

from lowtide.kernels import divide, native_library
from lowtide.kernels.triton.operands import RoundedRows, StepTable
from lowtide.kernels.triton.rounding_launches import (
    GroupNormWeights,
    LayerNormWeights,
    round_images,
    round_tokens,
)


def table(smooth=None, top=255) -> StepTable:
    return StepTable(
        SCALES.to(DEVICE), ZEROS.to(DEVICE), torch.tensor(STEP, device=DEVICE), top, smooth
    )


def plain(x: torch.Tensor, top: int = 255) -> torch.Tensor:
    """The codes of quantize_input, less 128, in its arithmetic."""
    scale, zero = current()
    return ((x.float() / scale).round().add(zero).clamp(0, top) - 128).to(torch.int8)


def check_sums(codes: RoundedRows) -> None:
    assert (codes.data[..., codes.channels :] == 0).all()
    assert torch.equal(codes.sums, codes.data.sum(-1).float())


LAYOUTS = {
    "dense": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "every other column": lambda x: torch.stack((x, x.neg()), -1).flatten(3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_get_the_codes_of_the_plain_rounding(layout, dtype):
    torch.manual_seed(0)
    x = LAYOUTS[layout](torch.randn(2, 9, 5, 7, device=DEVICE).to(dtype))
    codes = round_images(x, table(), 64, (2, 1))
    expected = plain(F.pad(x, (1, 1, 2, 2)))
    assert torch.equal(codes.data[..., :9].permute(0, 3, 1, 2), expected)
    check_sums(codes)


@pytest.mark.parametrize("channels", [1, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tokens_with_divided_channels(channels, dtype):
    if dtype == torch.bfloat16 and DEVICE.type == "cpu":
        pytest.skip("Triton's interpreter cuts bf16 numbers off where a card rounds them")
    torch.manual_seed(0)
    x = torch.randn(3, 5, channels, device=DEVICE).to(dtype)
    smooth = torch.rand(channels, device=DEVICE) + 0.5
    codes = round_tokens(x, table(smooth, 100), 320)
    expected = plain(divide(x, smooth), 100)
    assert torch.equal(codes.data[0, :, 0, :channels], expected.flatten(0, 1))
    check_sums(codes)


def test_ties_and_values_out_of_range():
    scale, _ = current()
    steps = torch.tensor([0.5, 1.5, -0.5, 2.5, 1e9, -1e9, float("inf"), 137.5, 138.5])
    x = (steps.to(DEVICE) * scale)[None]
    codes = round_tokens(x, table(), 64)
    assert torch.equal(codes.data.flatten()[: len(steps)], plain(x)[0])
    assert not codes.sums.isnan().any()


def test_a_row_knows_that_a_value_is_not_a_number():
    x = torch.zeros(4, 6, device=DEVICE)
    x[2, 5] = float("nan")
    assert round_tokens(x, table(), 64).sums.flatten().isnan().tolist() == [
        False,
        False,
        True,
        False,
    ]
    normed = round_tokens(x, table(), 64, LayerNormWeights())
    assert normed.sums.flatten().isnan().tolist() == [False, False, True, False]


def agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same codes, but for a few neighbours where float32 sums end at a tie."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "groups", "size"), [(12, 4, (5, 7)), (20, 2, (9, 4))])
def test_group_norm_and_silu(layout, channels, groups, size):
    torch.manual_seed(0)
    # A mean far from zero, which a sum of squares alone would not survive.
    x = LAYOUTS[layout](torch.randn(2, channels, *size, device=DEVICE) + 300)
    weight = torch.rand(channels, device=DEVICE) + 0.5
    bias = torch.randn(channels, device=DEVICE)
    norm = GroupNormWeights(groups, 1e-5, weight, bias)
    codes = round_images(x, table(), 64, (1, 1), norm, native_library.SILU)
    double = F.group_norm(x.double(), groups, weight.double(), bias.double())
    expected = plain(F.pad(F.silu(double.float()), (1, 1, 1, 1)))
    agrees(codes.data[..., :channels].permute(0, 3, 1, 2), expected)
    check_sums(codes)


def test_a_large_image_has_several_chunks():
    torch.manual_seed(0)
    x = (
        torch.randn(1, 4, 23, 11, device=DEVICE)
        * torch.tensor([1, 5.0], device=DEVICE).repeat(2)[:, None, None]
    )
    codes = round_images(x, table(), 64, norm=GroupNormWeights(2))
    expected = plain(F.group_norm(x.double(), 2).float())
    agrees(codes.data[..., :4].permute(0, 3, 1, 2), expected)


@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("channels", [16, 70])
def test_layer_norm(modulated, channels):
    torch.manual_seed(0)
    x = torch.randn(3, 5, 2 * channels, device=DEVICE)[..., ::2] + 20
    gain = torch.randn(3, channels, device=DEVICE)
    shift = torch.randn(1, channels, device=DEVICE)
    weight = torch.rand(channels, device=DEVICE)
    norm = LayerNormWeights(1e-6, gain=gain, shift=shift)
    if not modulated:
        norm = LayerNormWeights(1e-6, weight, shift[0])
    codes = round_tokens(x, table(), 128, norm)
    value = F.layer_norm(x.double(), (channels,), eps=1e-6)
    value = value * gain[:, None] + shift if modulated else value * weight + shift
    agrees(codes.data[0, :, 0, :channels], plain(value.float()).flatten(0, 1))
    check_sums(codes)


def test_nothing_to_round():
    assert round_tokens(torch.empty(0, 6, device=DEVICE), table(), 64).data.shape == (1, 0, 1, 64)
    empty = torch.empty(0, 6, device=DEVICE)
    assert round_tokens(empty, table(), 64, LayerNormWeights()).sums.shape == (1, 0, 1)
    image = torch.empty(0, 6, 3, 3, device=DEVICE)
    assert round_images(image, table(), 64, (1, 1)).data.shape == (0, 5, 5, 64)
