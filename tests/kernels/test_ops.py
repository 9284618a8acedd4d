"""The operators: torch's check of schema and shapes, inputs on their grids, a faster kernel."""

import subprocess
import sys

import pytest
import torch

from lowtide import kernels
from lowtide.formats import Affine, Mixed, pack, pack_mixed
from lowtide.kernels import Spec, quantize_input

KERNEL = """
import torch
from lowtide import kernels
from lowtide.formats import Affine

@kernels.linear.register_kernel("cpu")
def fast(x, weight, grid, step, spec, bias):
    return torch.full((len(x), len(grid[0])), 7.0)

grid = [torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.uint8), torch.empty(0), torch.empty(0)]
spec = kernels.Spec(8, Affine(4, False, 0), 0).flat()
codes = torch.zeros(3, 4, dtype=torch.uint8)
print(kernels.linear(torch.randn(2, 8), codes, grid, [], spec, None).unique().tolist())
"""


def arguments(form, rows=6, columns=18):
    levels = 2 if isinstance(form, Mixed) else 2**form.bits
    codes = torch.randint(levels, (rows, columns), dtype=torch.uint8)
    packed = pack_mixed(codes, form.bits) if isinstance(form, Mixed) else pack(codes, form.bits)
    zero = torch.empty(0) if form.signed else torch.full((rows, 1), 3, dtype=torch.uint8)
    factor = torch.empty(0)
    if form.group:
        factor = torch.full((rows, -(-columns // form.group)), 2, dtype=torch.uint8)
    step = [torch.tensor(0.1), torch.tensor(7, dtype=torch.uint8)]
    grid = [torch.rand(rows, 1) + 0.5, zero, factor, torch.empty(0)]
    return packed, grid, step, Spec(columns, form, 8).flat(), torch.randn(rows)


@pytest.mark.parametrize(
    "form",
    [
        Affine(4, axis=0),
        Affine(3, signed=True, axis=0, group=4),
        Affine(1, signed=True, axis=0),
        Mixed((1, 2, 3, 1, 2, 8)),
    ],
    ids=str,
)
def test_torch_accepts_schema_and_shapes(form):
    packed, *rest = arguments(form)
    torch.library.opcheck(
        kernels.linear,
        (torch.randn(5, 18), packed, *rest),
        test_utils=("test_schema", "test_faketensor"),
    )
    geometry = [3, 3, 2, 2, 1, 1, 1, 1, 1]
    image = torch.randn(2, 2, 7, 6)
    torch.library.opcheck(
        kernels.conv2d,
        (image, packed, *rest, geometry),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    "form",
    [
        Affine(4, axis=0),
        Affine(3, signed=True, axis=0, group=4),
        Affine(1, signed=True, axis=0),
        Mixed((1, 2, 3, 4, 2, 8)),
    ],
    ids=str,
)
def test_a_spec_survives_being_integers(form):
    assert Spec.of(Spec(18, form, 8).flat()) == Spec(18, form, 8)


def test_inputs_land_on_their_grid():
    x = torch.linspace(-3, 3, 101)
    scale = torch.tensor(0.5)
    zero = torch.tensor(2, dtype=torch.uint8)
    rounded = quantize_input(x, scale, zero, 7)
    assert torch.equal(rounded.unique(), torch.arange(-2, 6) * 0.5)
    inside = (x > -1.2) & (x < 2.7)
    assert (rounded - x)[inside].abs().max() <= 0.25 + 1e-6


def test_one_range_for_each_sample():
    x = torch.randn(4, 3, 5)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4])
    zero = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    together = quantize_input(x, scale, zero, 15)
    alone = [quantize_input(x[i : i + 1], scale[i], zero[i], 15) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))


def test_a_faster_kernel_replaces_the_reference():
    printed = subprocess.run(
        [sys.executable, "-c", KERNEL], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == "[7.0]"
