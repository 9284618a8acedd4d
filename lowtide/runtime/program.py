"""A program: the steps of a forward pass of one shape, ready to run on fixed memory."""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowtide.kernels import native_library
from lowtide.models.trace import mapped
from lowtide.runtime.graphs import Record, Recording, is_capturing
from lowtide.runtime.lowering import Lowered, Returned
from lowtide.runtime.memory import Arena, Buffer, View
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.steps import Step, TorchStep

FEATURE_BYTES = 64 * 2**20  # features that are kept


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


class ProgramPart(Protocol):
    """Steps on real memory."""

    def run(self) -> None: ...


Build = Callable[[list[Step | TorchStep], Arena], Sequence[ProgramPart]]


class Program:
    """The steps with their memory. `run` takes the inputs and the key of the conditions.

    `build` puts the steps on the memory.
    """

    def __init__(self, lowered: Lowered, numbers: Numbers, build: Build | None = None):
        build = build or parts_of
        # How the steps become a graph, and the graph; without the first, no graph is made.
        self.record: Record | None = None
        self.graph: Recording | None = None
        self.lowered = lowered
        self.numbers = numbers
        self.arena = Arena(numbers.table.device)
        self.arena.place(_lives(lowered))
        self.conditions = self._tensors(lowered.conditions)
        self.inputs = self._tensors(lowered.inputs)
        self.features = [self.arena.tensor(view) for view in lowered.features]
        self.known: dict[tuple, list[Tensor]] = {}
        self.output = lowered.output
        self.early = build(lowered.steps[: lowered.conditional], self.arena)
        self.late = build(lowered.steps[lowered.conditional :], self.arena)

    def _tensors(self, views: Mapping[str, View]) -> dict[str, Tensor]:
        return {name: self.arena.tensor(view) for name, view in views.items()}

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Tensor], key: tuple | None) -> Any:
        """Run the forward pass; the output is a copy that later runs do not change.

        Without a key, on a card, the features of the conditions are computed at each run.
        """
        for name, place in self.inputs.items():
            _fill(place, inputs[name])
        if key is None:
            self._run_on_card(inputs)
        else:
            self._set_features(inputs, key)
            _run_all(self.late)
        return mapped(self.output, self._given)

    def _run_on_card(self, inputs: Mapping[str, Tensor]) -> None:
        """All steps, or a recording of them."""
        for name, place in self.conditions.items():
            _fill(place, inputs[name])
        if self.record is not None and self.graph is None and not is_capturing(self.arena.device):
            self.graph = self.record(self._run_steps)
        if self.graph is None or is_capturing(self.arena.device):
            self._run_steps()
        else:
            self.graph.replay()

    def _run_steps(self) -> None:
        _run_all(self.early)
        _run_all(self.late)

    def _given(self, leaf: Any) -> Any:
        """A copy of a value for the caller, in the type of the forward pass."""
        if not isinstance(leaf, Returned):
            return leaf
        whole = self.arena.tensor(leaf.view)
        return whole.to(leaf.dtype, copy=True, memory_format=torch.contiguous_format)

    def _set_features(self, inputs: Mapping[str, Tensor], key: tuple) -> None:
        """The features of these conditions: from the table, or computed and added to it."""
        known = self.known.get(key)
        if known is not None:
            for place, feature in zip(self.features, known, strict=True):
                place.copy_(feature)
            return
        for name, place in self.conditions.items():
            _fill(place, inputs[name])
        _run_all(self.early)
        self._make_room()
        self.known[key] = [feature.clone() for feature in self.features]

    def _make_room(self) -> None:
        each = sum(feature.nbytes for feature in self.features)
        while self.known and each * (len(self.known) + 1) > FEATURE_BYTES:
            del self.known[next(iter(self.known))]


def _run_all(parts: Sequence[ProgramPart]) -> None:
    for part in parts:
        part.run()


def _fill(place: Tensor, value: Tensor) -> None:
    """Copy an input. One number on the CPU is an argument of a kernel, and nothing waits for it."""
    if value.device != place.device and value.device.type == "cpu" and value.numel() == 1:
        place.fill_(value.item())
    else:
        place.copy_(value, non_blocking=True)


def real_on(arena: Arena) -> Callable[[Any], Any]:
    """Turns a View into its tensor and leaves everything else."""
    return lambda leaf: arena.tensor(leaf) if isinstance(leaf, View) else leaf


def parts_of(steps: list[Step | TorchStep], arena: Arena) -> list[NativeCalls | TorchCall]:
    """The steps on real memory; native steps in a row are one call of the library."""
    parts: list[NativeCalls | TorchCall] = []
    waiting: list[Step] = []
    for step in steps:
        if isinstance(step, TorchStep):
            if waiting:
                parts.append(_native_calls(waiting, arena))
            waiting = []
            parts.append(torch_call(step, arena))
        else:
            waiting.append(step)
    if waiting:
        parts.append(_native_calls(waiting, arena))
    return parts


def _native_calls(steps: list[Step], arena: Arena) -> NativeCalls:
    structures = [step.structure(arena.address) for step in steps]
    calls = [
        native_library.Call(native_library.KERNELS[type(each)], 0, ctypes.addressof(each))
        for each in structures
    ]
    return NativeCalls((native_library.Call * len(calls))(*calls), structures)


def torch_call(step: TorchStep, arena: Arena) -> TorchCall:
    arguments = mapped(step.arguments, real_on(arena))
    keywords = mapped(step.keywords, real_on(arena))
    results = [arena.tensor(view) for view in step.results]
    return TorchCall(step.function, arguments, keywords, results)


def _lives(lowered: Lowered) -> dict[Buffer, tuple[int, int]]:
    """The first and the last step that uses each buffer of the arena; outputs live to the end."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for place, step in enumerate(lowered.steps):
        for buffer in step.uses():
            if buffer.fixed is None:
                first, _ = lives.get(buffer, (place, place))
                lives[buffer] = (first, place)

    def keep(leaf: Any) -> None:
        if isinstance(leaf, Returned) and leaf.view.buffer.fixed is None:
            first, _ = lives.get(leaf.view.buffer, (0, 0))
            lives[leaf.view.buffer] = (first, len(lowered.steps))

    mapped(lowered.output, keep)
    return lives
