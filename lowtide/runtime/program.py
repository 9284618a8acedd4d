"""A program: the steps of a forward pass of one shape, ready to run on fixed memory."""

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowtide.kernels import native_library
from lowtide.models.trace import mapped
from lowtide.runtime.lowering import Lowered, Numbers
from lowtide.runtime.memory import Arena, Buffer, View
from lowtide.runtime.steps import Step, TorchStep


class NotANumber(Exception):
    """An input of a rounding held NaN, which no code stands for."""


@dataclass(frozen=True)
class NativeCalls:
    """Consecutive native steps: one call of the library."""

    calls: ctypes.Array[native_library.Call]
    structures: list[ctypes.Structure]

    def run(self) -> None:
        outcome = native_library.native().run(self.calls, torch.get_num_threads())
        if outcome & native_library.NOT_A_NUMBER:
            raise NotANumber
        if outcome & native_library.NO_MEMORY:
            raise MemoryError("The native kernels found no memory for their scratch space.")
        assert not outcome, "a native kernel of another version was called"


@dataclass(frozen=True)
class TorchCall:
    """One step of torch on real memory."""

    function: Callable[..., Any]
    arguments: Any
    keywords: Any
    results: list[Tensor]

    def run(self) -> None:
        values = self.function(*self.arguments, **self.keywords)
        if not self.results:
            return
        if isinstance(values, Tensor):
            self.results[0].copy_(values)
            return
        for place, value in zip(self.results, values, strict=True):
            place.copy_(value)


class Program:
    """The steps with their memory. `run` takes the inputs, the features and the step."""

    def __init__(self, lowered: Lowered, numbers: Numbers):
        self.lowered = lowered
        self.numbers = numbers
        self.arena = Arena()
        self.arena.place(_lives(lowered))
        self.inputs = {name: self.arena.tensor(view) for name, view in lowered.inputs.items()}
        self.features = {id: self.arena.tensor(view) for id, view in lowered.features.items()}
        self.output = mapped(lowered.output, self._real)
        self.parts = self._parts()

    def _real(self, leaf: Any) -> Any:
        return self.arena.tensor(leaf) if isinstance(leaf, View) else leaf

    def _parts(self) -> list[NativeCalls | TorchCall]:
        parts: list[NativeCalls | TorchCall] = []
        waiting: list[Step] = []
        for step in self.lowered.steps:
            if isinstance(step, TorchStep):
                if waiting:
                    parts.append(self._native(waiting))
                waiting = []
                parts.append(self._torch(step))
            else:
                waiting.append(step)
        if waiting:
            parts.append(self._native(waiting))
        return parts

    def _native(self, steps: list[Step]) -> NativeCalls:
        structures = [step.structure(self.arena.address) for step in steps]
        calls = [
            native_library.Call(native_library.KERNELS[type(each)], 0, ctypes.addressof(each))
            for each in structures
        ]
        return NativeCalls((native_library.Call * len(calls))(*calls), structures)

    def _torch(self, step: TorchStep) -> TorchCall:
        arguments = mapped(step.arguments, self._real)
        keywords = mapped(step.keywords, self._real)
        results = [self.arena.tensor(view) for view in step.results]
        return TorchCall(step.function, arguments, keywords, results)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], features: Mapping[int, Tensor]) -> Any:
        """The output of the forward pass, in new memory."""
        for name, place in self.inputs.items():
            place.copy_(inputs[name])
        for id, place in self.features.items():
            place.copy_(features[id])
        for part in self.parts:
            part.run()
        return mapped(self.output, _copy)


def _copy(leaf: Any) -> Any:
    return leaf.clone(memory_format=torch.contiguous_format) if isinstance(leaf, Tensor) else leaf


def _lives(lowered: Lowered) -> dict[Buffer, tuple[int, int]]:
    """The first and the last step that uses each buffer of the arena; outputs live to the end."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for place, step in enumerate(lowered.steps):
        for buffer in step.uses():
            if buffer.fixed is None:
                first, _ = lives.get(buffer, (place, place))
                lives[buffer] = (first, place)

    def keep(leaf: Any) -> None:
        if isinstance(leaf, View) and leaf.buffer.fixed is None:
            first, _ = lives.get(leaf.buffer, (0, 0))
            lives[leaf.buffer] = (first, len(lowered.steps))

    mapped(lowered.output, keep)
    return lives
