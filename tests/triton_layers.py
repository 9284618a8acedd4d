"""What the tests of the Triton kernels share: random layers, grids of the running step, a device.

Without a CUDA card, the kernels run in Triton's interpreter on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats import Affine, Mixed, WeightFormat, pack, pack_mixed
from lowtide.kernels import Spec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STEP = 1  # the running step; the others have other grids
SCALES = torch.tensor([0.5, 0.03, 0.2])
ZEROS = torch.tensor([9, 117, 40], dtype=torch.uint8)
FORMATS = (
    Affine(8, signed=True, axis=0),
    Affine(4, axis=0),
    Affine(4, signed=True, axis=0),
    Affine(3, axis=0),
    Affine(2, axis=0),
    Affine(1, signed=True, axis=0),
    Affine(6, axis=0),
    Affine(3, signed=True, axis=0, group=8),
    Mixed((2, 3, 8, 1, 4, 5, 8, 2), signed=False),
)


@dataclass(frozen=True)
class Layer:
    """The weight of a packed layer, as its operator takes it."""

    packed: Tensor
    grid: list[Tensor]
    spec: Spec
    bias: Tensor


def random_layer(form: WeightFormat, rows: int, columns: int, input_bits: int = 8) -> Layer:
    if isinstance(form, Mixed):
        form = Mixed((form.bits * rows)[:rows], signed=form.signed)
        tops = torch.tensor([2**bits for bits in form.bits])
        codes = (torch.rand(rows, columns) * tops[:, None]).to(torch.uint8)
        packed = pack_mixed(codes, form.bits)
        # Channels of 1 and 8 bits are symmetric, whatever the others are.
        zeros = [0 if bits == 1 else 128 if bits == 8 else 2**bits // 3 for bits in form.bits]
        zero = torch.tensor(zeros, dtype=torch.uint8)[:, None]
    else:
        codes = torch.randint(2**form.bits, (rows, columns), dtype=torch.uint8)
        packed = pack(codes, form.bits)
        low = torch.randint(2**form.bits // 2, (rows, 1), dtype=torch.uint8)
        zero = torch.empty(0) if form.signed else low
    factor = torch.empty(0)
    if form.group:
        factor = torch.randint(1, 9, (rows, -(-columns // form.group)), dtype=torch.uint8)
    grid = [torch.rand(rows, 1) + 0.5, zero, factor, torch.empty(0)]
    on_device = [table.to(DEVICE) for table in grid]
    spec = Spec(columns, form, input_bits)
    return Layer(packed.to(DEVICE), on_device, spec, torch.randn(rows, device=DEVICE))


def current(scales: Tensor = SCALES, zeros: Tensor = ZEROS) -> list[Tensor]:
    """Scale and zero point of the running step, as the plain operators take them."""
    return [scales[STEP].to(DEVICE), zeros[STEP].to(DEVICE)]


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm())
