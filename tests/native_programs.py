"""Programs of native kernels for the tests: structures of tensors, and machines to run them."""

import ctypes
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowtide.kernels.divisors import Divisors
from lowtide.kernels.native_library import KERNELS, SETS, SINKS, Call, Native, Sink


@dataclass(frozen=True)
class Machine:
    """The kernels on one instruction set, with a number of threads."""

    native: Native = field(repr=False)
    set: int
    threads: int

    def run(self, *structures: ctypes.Structure) -> int:
        return self.native.run(program(*structures), self.threads, self.set)

    def __str__(self) -> str:
        [name] = [name for name, bit in SETS.items() if bit == self.set]
        return f"{name}-{self.threads}"


def program(*structures: ctypes.Structure) -> ctypes.Array:
    """The calls of some kernels; it keeps the structures, but not the tensors, alive."""
    calls = [
        Call(kernel=KERNELS[type(each)], arguments=ctypes.addressof(each)) for each in structures
    ]
    array = (Call * len(calls))(*calls)
    array.structures = structures
    return array


class Memory:
    """Gives the addresses of tensors and keeps the tensors alive."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def __call__(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self.tensors.append(tensor)
        return tensor.data_ptr()

    def number(self, value: float) -> int | None:
        return self(torch.tensor(value, dtype=torch.float32))


@dataclass(frozen=True)
class Steps:
    """The grid of a code sink: scale, zero point and last code."""

    scale: float
    zero: float
    top: int = 255

    def codes(self, x: Tensor) -> Tensor:
        """The plain rounding of `lowtide.kernels.quantize_input`, before it becomes values."""
        scale = torch.tensor(self.scale, dtype=torch.float32)
        return (x.float() / scale).round_().add_(self.zero).clamp_(0, self.top)


def float_sink(at: Memory, y: Tensor, **fields: Any) -> Sink:
    """Stores float32 values in y, (batch, height, width, channels)."""
    strides = dict(zip(("sample", "row", "column"), y.stride(), strict=False))
    return Sink(y=at(y), **strides, **{"upsample": 1, "channels": y.shape[-1], **fields})


def code_sink(
    at: Memory, y: Tensor, steps: Steps, smooth: Tensor | None = None, **fields: Any
) -> Sink:
    """Stores codes in y, (batch, height, width, channels)."""
    sink = float_sink(at, y, **fields)
    sink.scale = at.number(steps.scale)
    sink.zero = at.number(steps.zero)
    sink.top = steps.top
    if smooth is not None:
        divisors = Divisors.of(smooth)
        at.tensors.append(divisors)
        sink.smooth, sink.inverse = divisors.addresses
    return sink


def sinks(*some: Sink) -> dict[str, Any]:
    """The fields of a kernel with up to four sinks."""
    return {"sinks": len(some), "sink": (Sink * SINKS)(*some)}


def generator(*seeds: object) -> torch.Generator:
    return torch.Generator().manual_seed(hash_of(seeds))


def hash_of(seeds: tuple[object, ...]) -> int:
    """The same number in every process, unlike Python's hash of strings."""
    return sum((i + 1) * ord(letter) * 7919 for i, letter in enumerate(repr(seeds)))


def pick(choices: tuple[Any, ...] | range, random: torch.Generator) -> Any:
    return choices[int(torch.randint(len(choices), (), generator=random))]


def relative(found: Tensor, expected: Tensor) -> float:
    """The relative L2 distance."""
    difference = (found.double() - expected.double()).norm()
    return float(difference / expected.double().norm().clamp(min=1e-30))
