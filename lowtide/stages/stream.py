"""Stream: walk the recorded graph once, with the float and the quantized values of all calls.

At every unit the walk pauses with the unit's quantized inputs and its float answers. A stage works
on the unit, then both streams run through it. A unit's quantized input is the quantized output of
the units before it. Each value is dropped after its last use and goes to disk beyond the budget,
so memory does not grow with depth, and no unit costs a forward pass of the whole model.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.machine.peak_memory import release_free_memory
from lowtide.models import Unit
from lowtide.models.trace import Graph, Node, Ref, flat_inputs, leaves_of, mapped, run_node
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import QDrop, dropping
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.fisher import Fisher, fisher_weights
from lowtide.stages.tape import Store, Tape

Value = Tape | list[Any]  # one entry per call


@dataclass
class UnitData:
    """The calibration data of a unit: its inputs and float answers over all kept calls.

    batched: the values that have a batch axis.
    inputs: quantized inputs; floating: float inputs; targets: float answers, each by the number
        of the value in the graph.
    fisher: weights of the squared errors of the answers; None: all count alike.

    A sample is named by its number: call times batch size, plus its row in the call.
    """

    unit: Unit
    node: Node
    job: Job
    calls: list[Call]
    batched: frozenset[int]
    inputs: dict[int, Value]
    floating: dict[int, Value]
    targets: dict[int, Value]
    store: Store
    fisher: Fisher | None = None

    @property
    def module(self) -> nn.Module:
        """The unit's module in the job's model."""
        assert isinstance(self.node.target, str)
        return self.job.model.get_submodule(self.node.target)

    @property
    def batch(self) -> int:
        """Samples of one call."""
        return len(self.calls[0].arguments["timestep"])

    def bytes(self) -> int:
        """Bytes of the unit's inputs and answers."""
        total = 0
        for value in (*self.inputs.values(), *self.targets.values()):
            if isinstance(value, Tape):
                total += sum(part.numel() * part.element_size() for part in value.batches)
        return total

    def choose(self, generator: torch.Generator) -> list[int]:
        """A random batch of samples."""
        samples = sum(len(call.arguments["timestep"]) for call in self.calls)
        size = min(self.job.settings.batch, samples)
        return torch.randint(samples, (size,), generator=generator).tolist()

    def loss(self, generator: torch.Generator, drop: QDrop | None = None) -> Tensor:
        """Squared distance to the float answers on a random batch.

        It is summed over channels, which are the last axis where there are tokens, and averaged
        over the rest.
        """
        chosen = self.choose(generator)
        with dropping(self.module, drop):
            answer = self.answer(chosen, drop)
        losses: list[Tensor] = []
        for ours, ref in zip(leaves_of(answer), leaves_of(self.node.output), strict=True):
            if ref:
                target = self.rows(self.targets[ref.id], ref.id, chosen)
                error = (ours.float() - target.float()).square()
                if self.fisher is not None and ref.id in self.batched:
                    tape = self.fisher.tapes[len(losses)]
                    error = error * self.select(tape, chosen) / self.fisher.mean(len(losses))
                losses.append(error.sum(-1 if error.dim() == 3 else 1).mean())
        return reduce(torch.add, losses)

    def answer(self, chosen: list[int], drop: QDrop | None = None) -> object:
        """The unit's own answer to these samples, which may be at different timesteps."""
        self.set_clock(chosen)

        def value(leaf: object) -> object:
            return self._input(leaf.id, chosen, drop) if isinstance(leaf, Ref) else leaf

        return self.module(*mapped(self.node.args, value), **mapped(self.node.kwargs, value))

    def answer_on_call(self, call: int, *, quantized: bool) -> object:
        """The unit's answer to all samples of one call, on quantized or on float inputs."""
        data = self if quantized else replace(self, inputs=self.floating)
        return data.answer(list(range(call * self.batch, (call + 1) * self.batch)))

    def set_clock(self, chosen: list[int]) -> None:
        """Set the clock to the timesteps of these samples."""
        times = [self.calls[number // self.batch].timestep for number in chosen]
        clock = find_clock(self.job.model)
        clock.set(torch.tensor(times, dtype=torch.float64) / clock.ticks)

    def _input(self, id: int, chosen: list[int], drop: QDrop | None) -> object:
        """A quantized input, with some of its values replaced by their float values by `drop`."""
        rows = self.rows(self.inputs[id], id, chosen)
        if drop is None or not isinstance(rows, Tensor) or not rows.is_floating_point():
            return rows
        return drop(self.rows(self.floating[id], id, chosen), rows)

    def rows(self, value: Value, id: int, chosen: list[int]) -> Any:
        """These samples of a value; a value without a batch axis is the same for all."""
        return self.select(value, chosen) if id in self.batched else value[0]

    def select(self, value: Value, chosen: list[int]) -> Tensor:
        """These samples of a value with a batch axis, on the model's device."""
        size = len(value[0])
        samples = [value[number // size][number % size] for number in chosen]
        return torch.stack(samples).to(self.job.device)


class Stream:
    """The live values of both streams, by number in the graph.

    inputs_quantized: the quantized stream rounds inputs too.
    fisher: the losses of units weigh errors by the answer's squared gradients.
    temporal: temporal layers belong to the blocks that they are in; else no unit has them.
    """

    def __init__(
        self,
        job: Job,
        *,
        inputs_quantized: bool = False,
        temporal: bool = False,
        fisher: bool = False,
    ):
        self.job = job
        self.precision = Precision.of(weights=True, inputs=inputs_quantized)
        self.calls = [call for call in job.calls if call.kept]
        self.graph = job.adapter.block_graph(len(self.calls[0].arguments["timestep"]))
        self.batched = _batched(self.graph, job)
        self.store = Store(job.settings.memory)
        self.floating: dict[int, Value] = {}
        self.quantized: dict[int, Value] = {}
        self.units = {unit.name: unit for unit in stream_units(job, temporal=temporal)}
        self.weights = fisher_weights(job, self.units, self.store) if fisher else {}

    def walk(self) -> Iterator[UnitData]:
        """The data of each unit in forward order; its next item runs both streams through it."""
        self.feed()
        for node in self.graph.nodes:
            unit = self.units.get(node.target) if isinstance(node.target, str) else None
            answers = self._run(node, self.floating, Precision.FLOAT)
            if unit:
                yield self._unit_data(unit, node, answers)
            self.floating |= answers
            self.quantized |= self._run(node, self.quantized, self.precision)
            for id in node.frees:
                self.floating.pop(id, None)
                self.quantized.pop(id, None)
            if unit:
                release_free_memory()

    def _unit_data(self, unit: Unit, node: Node, answers: dict[int, Value]) -> UnitData:
        """The data of one unit, whose module is left quantized."""
        self._set_precision(node, self.precision)
        return UnitData(
            unit=unit,
            node=node,
            job=self.job,
            calls=self.calls,
            batched=self.batched,
            inputs={id: self.quantized[id] for id in node.uses()},
            floating={id: self.floating[id] for id in node.uses()},
            targets=answers,
            store=self.store,
            fisher=self.weights.pop(unit.name, None),
        )

    def feed(self) -> None:
        """Put the inputs of all calls in both streams."""
        inputs = [flat_inputs(call.arguments) for call in self.calls]
        for name, id in self.graph.inputs.items():
            tape = Tape(self.store)
            for tensors in inputs:
                tape.append(tensors[name])
            self.floating[id] = tape
            self.quantized[id] = tape

    def _set_precision(self, node: Node, precision: Precision) -> None:
        if isinstance(node.target, str):
            set_precision(self.job.model.get_submodule(node.target), precision)

    @torch.no_grad()
    def _run(self, node: Node, values: dict[int, Value], precision: Precision) -> dict[int, Value]:
        """Run one node on every call of one stream."""
        self._set_precision(node, precision)
        outputs: dict[int, Value] = {}
        device = self.job.device
        clock = find_clock(self.job.model)
        for number, call in enumerate(self.calls):
            clock.set(call.timestep / clock.ticks)

            def value(id: int, number: int = number) -> object:
                return _on(device, values[id][number])

            for id, result in run_node(node, self.job.model, value, device).items():
                if id not in outputs:
                    outputs[id] = Tape(self.store) if isinstance(result, Tensor) else []
                outputs[id].append(result)
        return outputs


def stream_units(job: Job, *, temporal: bool) -> list[Unit]:
    """The units of a stream; with `temporal`, temporal layers belong to their blocks."""
    if temporal:
        return job.adapter.units_by_block(job.adapter.reads)
    return [unit for unit in job.adapter.units() if unit.kind != "temporal"]


def _on(device: torch.device, value: object) -> object:
    return value.to(device) if isinstance(value, Tensor) else value


def _batched(graph: Graph, job: Job) -> frozenset[int]:
    """The values with a batch axis: their shape changes when the batch has one more sample."""
    size = len(job.calls[0].arguments["timestep"])
    larger = job.adapter.block_graph(size + 1)
    grown = (id for id, value in graph.values.items() if larger.values[id].shape != value.shape)
    return frozenset(grown)
