"""Attention in Triton against the plain attention of rounded operands, in float64."""

import pytest
import torch
from triton_layers import DEVICE, STEP, distance

pytest.importorskip("triton", reason="triton is not installed")

from lowtide.formats import Adaptive
from lowtide.formats.affine import Grid
from lowtide.kernels import quantize_input
from lowtide.kernels.triton.attention_launches import AttentionTables, attend
from lowtide.kernels.triton.operands import StepTable

# The powers of the softmax are float32, so a share next to a tie may get the neighbouring code.
BOUND = 1e-6
TIE = 1e-5


def table(scale: float, zero: int, top: int = 255) -> StepTable:
    """The given grid at step 1, and different grids at all other steps."""
    scales = torch.tensor([3 * scale, scale, 2 * scale], device=DEVICE)
    zeros = torch.tensor([0, zero, 1], dtype=torch.uint8, device=DEVICE)
    return StepTable(scales, zeros, torch.tensor([STEP], device=DEVICE), top)


def tables(softmax: StepTable, *, adaptive: bool = False) -> AttentionTables:
    parts = (table(0.023, 128), table(0.3, 7, 15), table(0.017, 140))
    return AttentionTables(*parts, softmax, adaptive)


def operands(samples: int, heads: int, queries: int, keys: int, width: int) -> list[torch.Tensor]:
    """Heads and tokens interleaved in one tensor, as a fused layer has them."""
    torch.manual_seed(queries * keys)
    size = (samples, max(queries, keys), heads, 3 * width)
    fused = torch.randn(size, device=DEVICE).transpose(1, 2)
    q, k, v = fused.split(width, -1)
    return [q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]]


def rounded(x: torch.Tensor, grid: StepTable) -> torch.Tensor:
    return quantize_input(x, grid.scale[STEP], grid.zero[STEP], grid.top).double()


def softmax(parts: list[torch.Tensor], grids: AttentionTables, bias=None) -> torch.Tensor:
    q, k, _ = parts
    scores = rounded(q, grids.q) @ rounded(k, grids.k).transpose(-2, -1) / q.shape[-1] ** 0.5
    return (scores if bias is None else scores + bias).softmax(-1)


SHAPES = [(1, 1, 1, 1, 8), (2, 3, 5, 7, 40), (1, 2, 33, 70, 16), (1, 1, 16, 130, 72)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("adaptive", "zero"), [(False, 3), (True, 0)])
def test_affine_softmax(shape, adaptive, zero):
    grids = tables(table(1 / 200, zero), adaptive=adaptive)
    parts = operands(*shape)
    found = attend(*parts, grids)
    shares = softmax(parts, grids)
    ratio = shares * 200
    near = ((ratio % 1 - 0.5).abs() < TIE * ratio.clamp(min=1)).any(-1)
    expected = rounded(shares.float(), grids.softmax) @ rounded(parts[2], grids.v)
    assert near.float().mean() < 0.1
    assert found.shape == expected.shape
    assert distance(found[~near], expected[~near]) < BOUND


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("bits", [3, 8])
def test_log2_softmax(shape, bits):
    grids = tables(table(0.37, 1, 2**bits - 1), adaptive=True)
    parts = operands(*shape)
    found = attend(*parts, grids)
    shares = softmax(parts, grids)
    form = Adaptive(bits)
    grid = Grid(grids.softmax.scale[STEP], grids.softmax.zero[STEP].float())
    exponent = -(shares / 0.37).log2()
    near = ((exponent % 1 - 0.5).abs() < TIE * exponent.abs().clamp(min=1)).any(-1)
    values = form.decode(form.encode(shares.float(), grid), grid).double()
    expected = values @ rounded(parts[2], grids.v)
    assert near.float().mean() < 0.1
    assert distance(found[~near], expected[~near]) < BOUND


def test_a_bias_for_each_key_and_hidden_keys():
    grids = tables(table(1 / 200, 0))
    parts = operands(2, 2, 9, 40, 16)
    bias = torch.randn(2, 1, 1, 40, device=DEVICE)
    bias[..., ::3] = -10000.0
    bias[..., :20] = -float("inf")
    found = attend(*parts, grids, bias)
    shares = softmax(parts, grids, bias)
    expected = rounded(shares.float(), grids.softmax) @ rounded(parts[2], grids.v)
    assert distance(found, expected) < BOUND


def test_every_sample_at_its_own_step():
    grids = tables(table(1 / 200, 0))
    parts = operands(2, 2, 5, 7, 16)
    index = torch.tensor([STEP, 2], device=DEVICE)
    running = [
        StepTable(each.scale, each.zero, index, each.top)
        for each in (grids.q, grids.k, grids.v, grids.softmax)
    ]
    found = attend(*parts, AttentionTables(*running))
    assert torch.equal(found[:1], attend(*[part[:1] for part in parts], grids))
    assert not torch.equal(found[1:], attend(*[part[1:] for part in parts], grids))


@pytest.mark.parametrize(("which", "spoilt"), [(0, "a query"), (1, "all"), (2, "a channel")])
def test_what_is_not_a_number_spoils_what_reads_it(which, spoilt):
    parts = [part.contiguous() for part in operands(1, 1, 5, 7, 8)]
    parts[which][0, 0, 2, 3] = float("nan")
    strange = attend(*parts, tables(table(1 / 200, 0)))[0, 0].isnan()
    expected = torch.zeros(5, 8, dtype=torch.bool, device=DEVICE)
    if spoilt == "a query":
        expected[2] = True
    elif spoilt == "all":
        expected[:] = True
    else:
        expected[:, 3] = True
    assert torch.equal(strange, expected)


def test_a_row_whose_keys_are_all_hidden_is_not_a_number():
    parts = operands(1, 1, 5, 7, 8)
    bias = torch.zeros(1, 1, 5, 7, device=DEVICE)
    bias[:, :, 1] = -float("inf")
    strange = attend(*parts, tables(table(1 / 200, 0)), bias)[0, 0].isnan()
    assert strange.all(1).tolist() == [False, True, False, False, False]
    assert strange.any(1).tolist() == [False, True, False, False, False]


def test_no_queries():
    parts = operands(1, 2, 0, 7, 8)
    assert attend(*parts, tables(table(1 / 200, 0))).shape == (1, 2, 0, 8)
