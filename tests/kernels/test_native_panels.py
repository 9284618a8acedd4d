"""Panels of weights: the values that the kernels unpack, and the memory that they take."""

import pytest
import torch
from native_programs import Memory, float_sink, generator

from lowtide.formats import Affine, Mixed, WeightFormat
from lowtide.formats.affine import Grid
from lowtide.kernels.native_library import Gemm
from lowtide.kernels.panels import ALIGNMENT, IntegerWeight, Panels, integer_weight, panels

FORMATS = [
    *(Affine(bits, signed=True, axis=0) for bits in range(1, 9)),
    *(Affine(bits, axis=0) for bits in range(1, 8)),
    Affine(4, signed=True, axis=0, group=16),
    Affine(3, axis=0, group=7),
    Mixed((1, 2, 3, 4, 5, 6, 7, 8) * 9),
    Mixed((1, 2, 3, 4, 5, 6, 7, 8) * 9, signed=False),
]


def weight_of(
    format: WeightFormat, rows: int, channels: int, taps: int = 1
) -> tuple[IntegerWeight, torch.Tensor]:
    """Random codes as integers of the kernels, and the values that the format gives them."""
    random = generator(str(format), rows, channels, taps)
    bits = format.bits if isinstance(format, Mixed) else (format.bits,) * rows
    tops = torch.tensor([[2**each for each in bits]]).T
    columns = channels * taps
    codes = (torch.rand(rows, columns, generator=random) * tops).floor().to(torch.uint8)
    ranges = format.rows(torch.randn(rows, columns, generator=random))
    grid = format.params(ranges.amin(1, keepdim=True), ranges.amax(1, keepdim=True), rows)
    integers = integer_weight(codes, grid.scale, grid.zero, grid.factor, format, taps)
    return integers, format.decode(codes, Grid(*grid))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_integers_times_the_scale_are_the_values_of_the_format(format):
    rows = 72
    integers, values = weight_of(format, rows, channels=10, taps=3)
    whole = integers.values().transpose(1, 2).reshape(rows, -1).float()
    # (code - zero) * scale in both, but for the order of the factors of a group.
    assert torch.allclose(whole * integers.scale[:, None], values, rtol=1e-6, atol=0)


def unpacked(machine, weight: Panels) -> torch.Tensor:
    """The int8 values in the kernels' order of k, (k, rows), as products with unit vectors."""
    k = weight.k4 * 4
    at = Memory()
    units = torch.eye(k, dtype=torch.uint8)
    y = torch.full((1, 1, k, weight.columns), float("nan"))
    gemm = Gemm(
        x=at(units),
        batch=1,
        height=1,
        width=k,
        x_column=k,
        taps=at(torch.zeros(1, dtype=torch.int64)),
        tap_count=1,
        tap_k4=weight.k4,
        x_scale=at.number(1.0),
        x_zero=at.number(0.0),
        weight=weight.structure,
        factor=1.0,
        sink=float_sink(at, y),
    )
    assert machine.run(gemm) == 0
    return (y[0, 0] / weight.scale).round()


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_kernels_unpack_the_integers(machine, format):
    integers, _ = weight_of(format, rows=72, channels=28, taps=3)
    found = unpacked(machine, panels(integers))
    assert torch.equal(found, integers.values().flatten(1).T.float())


@pytest.mark.parametrize("rows", [64, 80, 128, 320])
@pytest.mark.parametrize("columns", [32, 96, 576])
@pytest.mark.parametrize("bits", range(1, 9))
def test_memory_is_what_the_bits_take(bits, rows, columns):
    """Panels pad k to runs of 32 and rows to vectors of 16; these shapes fill both."""
    integers, _ = weight_of(Affine(bits, signed=True, axis=0), rows, columns)
    packed = panels(integers)
    assert packed.nbytes == bits * rows * columns / 8
    assert packed.data.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("signed", [True, False])
def test_memory_of_mixed_bits_is_their_sum(signed):
    bits = (1, 2, 3, 4, 5, 6, 7, 8) * 9
    integers, _ = weight_of(Mixed(bits, signed=signed), len(bits), 64)
    # Columns without a plane take no room in it, and 72 rows need no padding of their own.
    assert panels(integers).nbytes == sum(bits) * 64 // 8


def test_factors_of_groups_take_eight_bits():
    integers, _ = weight_of(Affine(4, signed=True, axis=0, group=16), 64, 64)
    assert panels(integers).nbytes == 64 * 64
