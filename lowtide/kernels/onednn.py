"""oneDNN through torch's own operators: products of uint8 codes and int8 weights, in float32.

No compiler is needed, and oneDNN brings what a CPU has: VNNI, AMX, the dot products of ARM. The
weight is put into oneDNN's own order once. Scale and zero point of the input are given at each
call, because they change with the sampling step.
"""

import time
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.kernels.integers import IntegerWeight

SLOW = 4  # oneDNN's reference loops are far slower than float32, its kernels are faster
_PROBE = (64, 512, 512)  # rows, k, columns


class Geometry(NamedTuple):
    """A convolution; a linear layer has a kernel of one pixel. Padding is always in the codes."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def is_linear(self) -> bool:
        return self == Geometry()


@dataclass(frozen=True)
class OneDnnWeight:
    """An int8 weight in oneDNN's order. `offsets`: scale times the sum of each column's values."""

    packed: Tensor
    scale: Tensor
    offsets: Tensor
    bias: Tensor
    zero: Tensor
    geometry: Geometry

    def product(self, codes: Tensor, scale: float, zero: int) -> Tensor:
        """The layer's output in float32 and new memory, of codes with the channels last.

        codes: (..., height, width, channels), or (..., channels) for a linear layer.
        """
        if self.geometry.is_linear:
            return self._linear(codes, scale, zero)
        # A zero point makes oneDNN's convolutions up to six times slower (256 channels at 4x4), as
        # they sum the weight at every call. The bias holds the zero point's part here.
        bias = torch.sub(self.bias, self.offsets, alpha=scale * zero) if zero else self.bias
        _, stride, dilation, groups = self.geometry
        output = ("none", [], "")
        images = codes.permute(0, 3, 1, 2)
        fields = (images, scale, 0, self.packed, self.scale, self.zero, bias, stride, (0, 0))
        types = (1.0, 0, torch.float32)
        result = _operators().qconv_pointwise(*fields, dilation, groups, *types, *output)
        return result.permute(0, 2, 3, 1)

    def _linear(self, codes: Tensor, scale: float, zero: int) -> Tensor:
        rows = codes.reshape(-1, codes.shape[-1])
        fields = (rows, scale, zero, self.packed, self.scale, self.zero, self.bias)
        types = (1.0, 0, torch.float32)
        result = _operators().qlinear_pointwise(*fields, *types, "none", [], "")
        return result.reshape(*codes.shape[:-1], len(self.scale))


def _operators() -> Any:
    return torch.ops.onednn


def onednn_weight(
    weight: IntegerWeight, bias: Tensor | None, geometry: Geometry, channels: int
) -> OneDnnWeight:
    """Prepack a weight. `channels`: of one pixel of the codes; those after the layer's are zero."""
    values = weight.values()
    padded = F.pad(values, (0, channels // geometry.groups - values.shape[2]))
    return prepacked(padded, weight.scale.float(), bias, geometry)


def prepacked(
    values: Tensor, scale: Tensor, bias: Tensor | None, geometry: Geometry
) -> OneDnnWeight:
    """Prepack int8 values, rows x taps x channels of a group."""
    rows, _, channels = values.shape
    scale = scale.contiguous()
    bias = torch.zeros(rows) if bias is None else bias.float()
    offsets = scale * values.sum((1, 2), dtype=torch.int32)
    zero = torch.zeros(rows, dtype=torch.int64)
    if geometry.is_linear:
        packed = _operators().qlinear_prepack(values.reshape(rows, channels), None)
    else:
        _, stride, dilation, groups = geometry
        images = values.transpose(1, 2).reshape(rows, channels, *geometry.kernel)
        fields = (stride, (0, 0), dilation, groups)
        packed = _operators().qconv_prepack(images, scale, 1.0, 0, *fields)
    return OneDnnWeight(packed, scale, offsets, bias, zero, geometry)


@cache
def unsupported() -> str:
    """Why oneDNN's products cannot be used on this machine; empty if they can."""
    names = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")
    if not all(hasattr(_operators(), name) for name in names):
        return "this build of torch has no oneDNN for integers"
    try:
        exact = _is_exact(Geometry()) and _is_exact(Geometry(kernel=(3, 3)))
    except RuntimeError as error:
        [first, *_] = str(error).splitlines() or [""]
        return f"oneDNN refuses integers on this CPU ({first})"
    if not exact:
        return "oneDNN's sums of 8-bit products overflow on this CPU"
    return "oneDNN has only its slow reference for integers on this CPU" if _is_slow() else ""


def _is_exact(geometry: Geometry) -> bool:
    """Whether the largest codes and values give the right sums.

    Without VNNI or AMX, two products are added in 16 bits, which saturates.
    """
    taps = geometry.kernel[0] * geometry.kernel[1]
    values = torch.full((32, taps, 64), 127, dtype=torch.int8)
    values[1::2] = -127
    codes = torch.full((2, 5, 6, 64), 255, dtype=torch.uint8)
    sums = values.double().sum((1, 2))
    weight = prepacked(values, torch.ones(32), None, geometry)
    expected = [sums * (255 - zero) for zero in (0, 3)]
    found = [weight.product(codes, 1.0, zero)[0, 0, 0].double() for zero in (0, 3)]
    return all(map(torch.equal, found, expected))


def _is_slow() -> bool:
    rows, k, columns = _PROBE
    x = torch.zeros(rows, k)
    weight = torch.zeros(columns, k)
    codes = x.to(torch.uint8)
    values = weight.to(torch.int8).unsqueeze(1)
    product = prepacked(values, torch.ones(columns), None, Geometry())
    integers: list[float] = []
    floats: list[float] = []
    for _ in range(3):
        start = time.perf_counter()
        product.product(codes, 1.0, 0)
        middle = time.perf_counter()
        F.linear(x, weight)
        integers.append(middle - start)
        floats.append(time.perf_counter() - middle)
    return min(integers) > SLOW * min(floats)
