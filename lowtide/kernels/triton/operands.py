"""What the launches of the Triton kernels share: their operands, and the device they run on."""

# triton is not installed everywhere, and a launch also takes options of Triton's compiler.
# pyright: reportMissingImports=false, reportCallIssue=false

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowtide.kernels.native_library import IDENTITY
from lowtide.kernels.triton.tiles import INTERPRETER

# A product and the sum that it joins may become one instruction, as in torch's own kernels.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class StepTable:
    """The grid of an input at all steps, and the running step.

    scale: (steps,) float32; zero: (steps,) uint8; index: one step for all samples, or one for each.
    Attention folds its heads into the batch, so a sample may be several rows. `smooth`: divisors of
    the channels, or None.
    """

    scale: Tensor
    zero: Tensor
    index: Tensor
    top: int = 255
    smooth: Tensor | None = None

    def rows_per_step(self, rows: int) -> int:
        return max(1, rows // self.index.numel())

    @property
    def is_one_step(self) -> bool:
        return self.index.numel() == 1


@dataclass(frozen=True)
class RoundedRows:
    """int8 codes, (samples, tall, wide, room), each less 128, and the sum of each pixel's codes.

    The first `channels` of a pixel count, the others are 0. Tokens have a width of 1.
    """

    data: Tensor
    sums: Tensor
    channels: int
    table: StepTable

    @property
    def samples(self) -> int:
        return self.data.shape[0]

    @property
    def pixels(self) -> int:
        return self.data.shape[1] * self.data.shape[2]


@dataclass(frozen=True)
class Window:
    """What a convolution reads, (vertical, horizontal). The codes hold the border."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def is_flat(self) -> bool:
        return self.taps == 1 and self.stride == (1, 1)

    def output(self, tall: int, wide: int) -> tuple[int, int]:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (tall - reach[0]) // self.stride[0] + 1, (wide - reach[1]) // self.stride[1] + 1


@dataclass(frozen=True)
class Epilogue:
    """What follows the product, in this order.

    bias; a vector for each sample (samples or 1, columns); an activation of native_library; a gate
    (samples or 1, columns); a residual (samples, tall, wide, columns), dense; a factor.
    """

    bias: Tensor | None = None
    per_sample: Tensor | None = None
    activation: int = IDENTITY
    gate: Tensor | None = None
    residual: Tensor | None = None
    factor: float = 1.0


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the one of the tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def capability_of(tensor: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else INTERPRETER


def power(size: int) -> int:
    return triton.next_power_of_2(size)


def sample_stride(vector: Tensor | None) -> int:
    """The distance of the vectors of two samples; 0 if all samples share one."""
    return 0 if vector is None or len(vector) == 1 else vector.stride(0)


def kind_of_products(tensor: Tensor, kind: tl.dtype) -> tl.dtype:
    """The type of the factors of a product of floats: float32 in the interpreter.

    The interpreter multiplies the bits of bf16 numbers as integers.
    """
    return tl.float32 if capability_of(tensor) == INTERPRETER else kind
