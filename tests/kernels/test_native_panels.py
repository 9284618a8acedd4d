"""Panels of weights: the values that the kernels unpack, and the memory that they take."""

import pytest
import torch
from native_programs import Memory, float_sink, generator

from lowtide.errors import BadInput
from lowtide.formats import Affine, Mixed, WeightFormat, pack, pack_mixed
from lowtide.formats.affine import Grid
from lowtide.kernels.integers import IntegerWeight, Rows, integer_weight, rows_of
from lowtide.kernels.native_library import Gemm
from lowtide.kernels.panels import ALIGNMENT, Panels, arranged, panels, restored

FORMATS = [
    *(Affine(bits, signed=True, axis=0) for bits in range(1, 9)),
    *(Affine(bits, axis=0) for bits in range(1, 8)),
    Affine(4, signed=True, axis=0, group=16),
    Affine(3, axis=0, group=7),
    Affine(2, axis=0, group=1),
    Affine(6, signed=True, axis=0, group=32),
    Affine(8, signed=True, axis=0, group=4),
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
    integers = integer_weight(codes, rows_of(*grid, format), taps)
    return integers, format.decode(codes, Grid(*grid))


# Rows, channels, taps: whole and broken vectors, panels, runs, dwords and blocks.
SHAPES = [
    (72, 10, 3),
    (1, 1, 9),
    (130, 70, 1),
    (64, 128, 1),
    (17, 2000, 1),
    (16, 96, 9),
    (80, 200, 9),
    (33, 68, 9),
    (5, 3, 49),
    (20, 64, 25),
]


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


@pytest.mark.parametrize(("channels", "taps"), [(28, 3), (128, 1), (37, 1), (5, 9)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_kernels_unpack_the_integers(machine, format, channels, taps):
    integers, _ = weight_of(format, 72, channels, taps)
    found = unpacked(machine, panels(integers))
    values = integers.values()
    padded = torch.nn.functional.pad(values, (0, -channels % 4)).flatten(1).T
    in_pixels = torch.arange(len(padded)) % (-(-channels // 4) * 4) < channels
    assert torch.equal(found[in_pixels], padded[in_pixels].float())


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


@pytest.mark.parametrize("group", [16, 64])
@pytest.mark.parametrize("bits", range(2, 8))
def test_a_weight_in_groups_takes_its_bits_and_a_byte_for_each_group(bits, group):
    integers, _ = weight_of(Affine(bits, signed=True, axis=0, group=group), 64, 192)
    assert panels(integers).nbytes == 64 * (bits * 192 // 8 + 192 // group)


def test_eight_bits_in_groups_are_multiplied_already():
    integers, _ = weight_of(Affine(8, signed=True, axis=0, group=16), 64, 64)
    packed = panels(integers)
    assert (packed.nbytes, packed.factors) == (64 * 64, None)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize(("rows", "channels", "taps"), SHAPES)
def test_the_library_arranges_as_torch_does_and_back(forced, format, rows, channels, taps):
    if isinstance(format, Mixed):
        format = Mixed((format.bits * 2)[:rows], signed=format.signed)
    columns = channels * taps
    random = generator(str(format), rows, channels, taps)
    bits = format.bits if isinstance(format, Mixed) else (format.bits,) * rows
    tops = torch.tensor([[2**each for each in bits]]).T
    codes = (torch.rand(rows, columns, generator=random) * tops).floor().to(torch.uint8)
    ranges = format.rows(torch.randn(rows, columns, generator=random))
    grid = format.params(ranges.amin(1, keepdim=True), ranges.amax(1, keepdim=True), rows)
    packed = pack_mixed(codes, bits) if isinstance(format, Mixed) else pack(codes, format.bits)
    of_rows = rows_of(*grid, format)
    if not of_rows.fits:
        return
    found = arranged(packed, of_rows, channels, taps)
    expected = panels(integer_weight(codes, of_rows, taps))
    for name in ("data", "panel", "masks", "shifts", "zeros", "scale", "sums"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for one, other in ((found.factors, expected.factors), (found.groups, expected.groups)):
        assert (one is None and other is None) or torch.equal(one, other)
    assert (found.k4, found.planes, found.uniform) == (
        expected.k4,
        expected.planes,
        expected.uniform,
    )
    assert torch.equal(restored(found.data, of_rows, channels, taps), packed.flatten())


def test_values_beyond_int8_do_not_fit():
    scale = torch.ones(2, 1)
    assert rows_of(scale, torch.full((2, 1), 128.0), None, Affine(8, signed=True, axis=0)).fits
    assert not rows_of(scale, torch.zeros(2, 1), None, Affine(8, axis=0)).fits
    grouped = Affine(5, axis=0, group=4)
    assert not rows_of(scale, torch.zeros(2, 1), torch.full((2, 3), 7), grouped).fits
    assert rows_of(scale, torch.full((2, 1), 16.0), torch.full((2, 3), 7), grouped).fits


def test_values_beyond_int8_are_refused():
    codes = torch.tensor([[[0, 15]]], dtype=torch.uint8)
    bits = torch.tensor([4], dtype=torch.int32)
    rows = Rows(bits, torch.zeros(1), torch.zeros(1), torch.ones(1), torch.tensor([[9]]), 2)
    expected = "found weights from 0 to 135 steps; expected -128 to 127, which an int8 holds"
    with pytest.raises(BadInput, match=expected):
        IntegerWeight(codes, rows).values()
    held = IntegerWeight(codes.clamp(max=14), rows)
    assert held.values().flatten().tolist() == [0, 126]
