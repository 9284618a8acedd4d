"""A denoiser prepared to run: its layers in the kernels' order, and a program for each shape."""

import gc
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from operator import attrgetter, is_not
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.kernels.race import NATIVE
from lowtide.models.named_inputs import flat_inputs
from lowtide.models.trace import Graph
from lowtide.nn.clock import find_clock
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.swap import packed_layers, quantizers
from lowtide.runtime.covers import COVERS
from lowtide.runtime.engines import Engines
from lowtide.runtime.float_twin import record_twin
from lowtide.runtime.guard import Modules
from lowtide.runtime.layers import NativeLayer, native_layer
from lowtide.runtime.lowering import Lowering
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.onednn_layer import unsupported
from lowtide.runtime.own_range_layer import OneDnnProduct, onednn_product
from lowtide.runtime.program import Program
from lowtide.runtime.program_store import ProgramStore
from lowtide.runtime.side_layers import SideLayers

TIMESTEP = "timestep"
VERSION = attrgetter("_version")
IS_THERE = partial(is_not, None)


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the context, Python does not look for unused cycles of objects.

    A new program makes enough objects to set that off, and it walks over everything that torch and
    diffusers hold: a quarter of a second, for a few objects without data.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


class Prepared:
    """What stays between the calls of a denoiser, until a weight or a table changes.

    `layers`: the layers that native kernels run; `reasons`: why the others run in torch,
    `products`: those of them that run on oneDNN there.
    """

    def __init__(
        self, root: nn.Module, engine: str | None = None, kept: dict[str, str] | None = None
    ):
        self.root = root
        self.engines = Engines(root, engine, kept)
        self.parameters = list(inspect.signature(type(root).forward).parameters)[1:]
        self.store = ProgramStore(self._new_program)
        self.lock = Lock()
        self.clock = find_clock(root)
        self.tables = (self.clock.scale, self.clock.zero, self.clock.timesteps)
        self.modules = Modules(root, self.clock)
        self.sides = SideLayers(root)
        self.layers: dict[str, NativeLayer] = {}
        self.reasons: dict[str, str] = {}
        self.products: dict[PackedLinear | PackedConv2d, OneDnnProduct] = {}
        for name, layer in packed_layers(root):
            native = native_layer(layer)
            if isinstance(native, NativeLayer):
                self.layers[name] = native
            else:
                self.reasons[name] = native
                if engine != NATIVE and not unsupported(layer):
                    self.products[layer] = onednn_product(layer)
        packed = [layer for _, layer in packed_layers(root)]
        self.weights = [(layer, layer.weight, layer.weight._version) for layer in packed]
        self.holders = [module._parameters for module in root.modules() if module._parameters]
        # The parameters and their memory are kept, so that no new one gets the place of an old one.
        self.stamped = list(chain.from_iterable(map(dict.values, self.holders)))
        self.memory = [value.detach() for value in self.stamped if value is not None]
        self.stamps = self._stamps()

    def _stamps(self) -> tuple[list[int], list[int], list[int]]:
        """Which tensors the parameters are, how often each was written into, and where it is.

        A cast such as `.to(torch.bfloat16)` gives a parameter other memory, and nothing else tells.
        """
        values = list(filter(IS_THERE, chain.from_iterable(map(dict.values, self.holders))))
        return list(map(id, values)), list(map(VERSION, values)), list(map(Tensor.data_ptr, values))

    def is_stale(self) -> bool:
        """Whether a table or a weight has changed since the layers were prepared."""
        clock = self.clock
        current = (clock.scale, clock.zero, clock.timesteps)
        if any(now is not before for now, before in zip(current, self.tables, strict=True)):
            return True
        if self.modules.have_other_sides(self.sides):
            return True
        if self._stamps() == self.stamps:
            return False
        for layer, weight, version in self.weights:
            if weight._version != version:
                # Its panels were written into, and the sums beside them are of before.
                layer.hold_codes()
        return True

    def run(self, inputs: dict[str, Any]) -> Any:
        """The forward pass on these inputs, by the program of their shapes and settings."""
        inputs = inputs | {TIMESTEP: timestep_tensor(inputs[TIMESTEP])}
        tensors = flat_inputs(inputs)
        step = int(self.clock.index) if self.clock.keyed else 0
        # A program has one set of memory, so two threads take turns.
        with self.lock:
            program = self.store.program(inputs, tensors)
            program.numbers.set_step(step)
            conditions = [_content(tensors[name]) for name in program.conditions]
            return program.run(tensors, (step, *conditions))

    @torch.inference_mode(mode=False)
    @uncollected()
    def _new_program(self, inputs: Mapping[str, Any]) -> Program:
        graph = record_twin(self.root, inputs)
        rounding = list(quantizers(self.root).values())
        numbers = Numbers(rounding, self.clock.steps)
        conditions = conditions_of(graph, self.parameters[0])
        lowering = Lowering(self.root, graph, numbers, self.layers, conditions, COVERS)
        return Program(self.engines.assigned(lowering.lower()), numbers)


def conditions_of(graph: Graph, sample: str) -> frozenset[str]:
    """The inputs that stay for a while: the timestep, labels, pooled texts. Not sample or text."""
    shapes = {name: graph.values[number].shape for name, number in graph.inputs.items()}
    return frozenset(name for name, shape in shapes.items() if len(shape) < 3 and name != sample)


def timestep_tensor(timestep: Any) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep
    kind = torch.float64 if isinstance(timestep, float) else torch.int64
    return torch.tensor(timestep, dtype=kind)


def _content(tensor: Tensor) -> bytes:
    whole = tensor.detach().clone(memory_format=torch.contiguous_format)
    return whole.reshape(-1).view(torch.uint8).numpy().tobytes()
