"""Stream: walk the recorded graph once, all calibration calls abreast, with the float and the quantized values side by side.

At every unit the walk pauses: its quantized inputs and its float answers are at hand, the unit is worked on, then both
streams go on through it. A unit's quantized input is its predecessors' quantized output. Each value is dropped after its
last use and spilled to disk beyond the budget, so memory does not grow with depth, and no unit costs a forward pass of the
whole model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.machine.peak_memory import give_back
from lowtide.models import Unit
from lowtide.models.trace import Graph, Node, Ref, flat_inputs, leaves_of, mapped, run_node
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Drop, dropping
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.tape import Store, Tape

Value = Tape | list[Any]


@dataclass
class Scene:
    """A unit with its quantized inputs, the float ones and its float answers over all calls."""

    unit: Unit
    node: Node
    job: Job
    calls: list[Call]
    batched: frozenset[int]
    inputs: dict[int, Value]
    floating: dict[int, Value]
    targets: dict[int, Value]
    store: Store

    def loss(self, generator: torch.Generator, drop: Drop | None = None) -> Tensor:
        """Squared distance to the float answers on a random batch: summed over channels, which are last where there are tokens,
        averaged over the rest."""
        chosen = self.choose(generator)
        with dropping(self.module, drop):
            answer = self.answer(chosen, drop)
        pairs = [
            (leaf, ref.id)
            for leaf, ref in zip(leaves_of(answer), leaves_of(self.node.output), strict=True)
            if ref
        ]
        apart = [
            leaf.float() - self.rows(self.targets[id], id, chosen).float() for leaf, id in pairs
        ]
        return sum(each.square().sum(-1 if each.dim() == 3 else 1).mean() for each in apart)

    def bytes(self) -> int:
        """What the unit's inputs and answers take."""
        values = [*self.inputs.values(), *self.targets.values()]
        return sum(
            part.numel() * part.element_size()
            for tape in values
            if isinstance(tape, Tape)
            for part in tape.batches
        )

    def choose(self, generator: torch.Generator) -> list[int]:
        samples = sum(len(call.arguments["timestep"]) for call in self.calls)
        return torch.randint(
            samples, (min(self.job.settings.batch, samples),), generator=generator
        ).tolist()

    def answer(self, chosen: list[int], drop: Drop | None = None) -> Any:
        """The unit's own answer on these samples, whatever timesteps they have."""
        self.set_clock(chosen)

        def picked(leaf: Any) -> Any:
            return self.given(leaf.id, chosen, drop) if isinstance(leaf, Ref) else leaf

        return self.module(*mapped(self.node.args, picked), **mapped(self.node.kwargs, picked))

    def set_clock(self, chosen: list[int]) -> None:
        size = len(self.calls[0].arguments["timestep"])
        times = [self.calls[number // size].timestep for number in chosen]
        clock = find_clock(self.job.model)
        clock.set(torch.tensor(times, dtype=torch.float64) / clock.ticks)

    def given(self, id: int, chosen: list[int], drop: Drop | None) -> Any:
        """An input as its predecessors' quantized output, or dropped here and there to what it is in float."""
        found = self.rows(self.inputs[id], id, chosen)
        if drop is None or not isinstance(found, Tensor) or not found.is_floating_point():
            return found
        return drop(self.rows(self.floating[id], id, chosen), found)

    @property
    def module(self) -> nn.Module:
        return self.job.model.get_submodule(self.node.target)

    def rows(self, value: Value, id: int, chosen: list[int]) -> Any:
        """These samples of a value; a value without a batch axis is the same for all."""
        return self.taken(value, chosen) if id in self.batched else value[0]

    def whole(self, call: int, quantized: bool) -> Any:
        """The unit's answer on all samples of one call, on quantized or on float inputs."""
        size = len(self.calls[0].arguments["timestep"])
        source = self if quantized else replace(self, inputs=self.floating)
        return source.answer(list(range(call * size, (call + 1) * size)))

    def taken(self, value: Value, chosen: list[int]) -> Tensor:
        size = len(value[0])
        return torch.stack([value[number // size][number % size] for number in chosen]).to(
            self.device
        )

    @property
    def device(self) -> torch.device:
        return next(self.job.model.parameters()).device


class Stream:
    """Both streams' live values, by number. With `temporal`, temporal layers belong to the blocks they lie in."""

    def __init__(self, job: Job, inputs_quantized: bool = False, temporal: bool = False):
        self.job, self.inputs_quantized = job, inputs_quantized
        self.calls = [call for call in job.calls if call.kept]
        self.graph = job.adapter.block_graph(len(self.calls[0].arguments["timestep"]))
        self.batched = batched(self.graph, job)
        self.store = Store(job.settings.memory)
        self.floating: dict[int, Value] = {}
        self.quantized: dict[int, Value] = {}
        apart = [unit for unit in job.adapter.units() if unit.kind != "temporal"]
        self.units = {
            unit.name: unit
            for unit in (job.adapter.homes(job.adapter.reads) if temporal else apart)
        }

    def scenes(self) -> Iterator[Scene]:
        """Each unit in forward order; going on to the next runs both streams through it."""
        self.feed()
        for node in self.graph.nodes:
            unit = self.units.get(node.target) if node.is_leaf else None
            answers = self.run(node, self.floating, (False, False))
            if unit:
                inputs, floating = (
                    {id: values[id] for id in node.uses()}
                    for values in (self.quantized, self.floating)
                )
                self.show(node.target, True, self.inputs_quantized)
                yield Scene(
                    unit,
                    node,
                    self.job,
                    self.calls,
                    self.batched,
                    inputs,
                    floating,
                    answers,
                    self.store,
                )
            self.floating |= answers
            self.quantized |= self.run(node, self.quantized, (True, self.inputs_quantized))
            for id in node.frees:
                self.floating.pop(id, None)
                self.quantized.pop(id, None)
            if unit:
                give_back()

    def feed(self) -> None:
        given = [flat_inputs(call.arguments) for call in self.calls]
        for name, id in self.graph.inputs.items():
            tape = Tape(self.store)
            for arguments in given:
                tape.append(arguments[name])
            self.floating[id] = self.quantized[id] = tape

    def show(self, target: Any, quantized: bool, inputs: bool) -> None:
        if isinstance(target, str):
            set_precision(
                self.job.model.get_submodule(target), Precision.of(weights=quantized, inputs=inputs)
            )

    @torch.no_grad()
    def run(
        self, node: Node, values: dict[int, Value], state: tuple[bool, bool]
    ) -> dict[int, Value]:
        """Run one node on every call of one stream."""
        self.show(node.target, *state)
        given: dict[int, Value] = {}
        device = next(self.job.model.parameters()).device
        clock = find_clock(self.job.model)
        for place, call in enumerate(self.calls):
            clock.set(call.timestep / clock.ticks)
            results = run_node(
                node, self.job.model, lambda id, place=place: on(device, values[id][place]), device
            )
            for id, result in results.items():
                given.setdefault(id, Tape(self.store) if isinstance(result, Tensor) else []).append(
                    result
                )
        return given


def on(device: torch.device, value: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def batched(graph: Graph, job: Job) -> frozenset[int]:
    """Values with a batch axis: their first axis grew when the same pass was recorded with one more sample."""
    size = len(job.calls[0].arguments["timestep"])
    larger = job.adapter.block_graph(size + 1)
    grown = (id for id, value in graph.values.items() if larger.values[id].shape != value.shape)
    return frozenset(grown)
