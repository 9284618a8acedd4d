"""Stream: walk the recorded graph once, with the float and the quantized values of all calls.

At every unit the walk pauses with the unit's quantized inputs and its float answers. A stage works
on the unit, then both streams run through it. A unit's quantized input is the quantized output of
the units before it. Each value is dropped after its last use and goes to disk beyond the budget,
so memory does not grow with depth, and no unit costs a forward pass of the whole model.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.machine.devices import CPU
from lowtide.machine.peak_memory import release_free_memory
from lowtide.models import Unit
from lowtide.models.named_inputs import flat_inputs
from lowtide.models.trace import Graph, Node, Ref, leaves_of, mapped, run_node
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import QDrop, SamplePart, dropping
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.fisher import Fisher, fisher_weights
from lowtide.stages.held_out import split_of
from lowtide.stages.tape import Store, Tape
from lowtide.stages.upcoming import Upcoming

Value = Tape | list[Any]  # one entry per call


@dataclass(frozen=True)
class UnitRows:
    """Samples of a unit's values: quantized and float inputs, float answers, by number.

    `batched`: the values that have a batch axis.
    """

    chosen: Sequence[int]
    batched: frozenset[int]
    inputs: dict[int, Any]
    floating: dict[int, Any]
    targets: dict[int, Any]

    def part(self, span: slice, device: torch.device) -> "UnitRows":
        """Some of the samples, on the device."""

        start, stop, _ = span.indices(len(self.chosen))

        def moved(id: int, value: object) -> object:
            if not isinstance(value, Tensor):
                return value
            each = len(value) // len(self.chosen)
            rows = value[each * start : each * stop] if id in self.batched else value
            return rows.to(device, non_blocking=True)

        values = (self.inputs, self.floating, self.targets)
        parts = [{id: moved(id, each) for id, each in part.items()} for part in values]
        return UnitRows(self.chosen[span], self.batched, *parts)

    def input(self, id: int, drop: QDrop | None) -> object:
        """A quantized input, with some of its values replaced by their float values by `drop`."""
        rows = self.inputs[id]
        if drop is None or not isinstance(rows, Tensor) or not rows.is_floating_point():
            return rows
        return drop(self.floating[id], rows)


@dataclass
class UnitData:
    """The calibration data of a unit: its inputs and float answers over all kept calls.

    batched: the values that have a batch axis.
    inputs: quantized inputs; floating: float inputs; targets: float answers, each by the number
        of the value in the graph.
    fisher: weights of the squared errors of the answers; None: all count alike.
    split: the samples to learn from, and those that judge.

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
    split: tuple[list[int], list[int]]
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

    @property
    def samples(self) -> int:
        """The number of samples in all calls."""
        return sum(len(call.arguments["timestep"]) for call in self.calls)

    @property
    def drawn(self) -> int:
        """The number of samples in one batch, over all ranks."""
        return min(self.job.batch, self.samples)

    def choose(self, generator: torch.Generator, *, held_out: bool = False) -> list[int]:
        """Draw the numbers of the samples in one batch, which all ranks share out."""
        numbers = self.split[held_out]
        places = torch.randint(len(numbers), (self.drawn,), generator=generator).tolist()
        return [numbers[place] for place in places]

    def choose_learnt(self, generator: torch.Generator) -> Sequence[int]:
        """Draw a batch to learn from; the numbers of the samples that this rank computes."""
        return self.job.world.part(self.choose(generator))

    def choose_held_out(self, generator: torch.Generator) -> Sequence[int]:
        """Draw a batch that judges what was learnt; the numbers of this rank's samples."""
        return self.job.world.part(self.choose(generator, held_out=True))

    def loss(self, generator: torch.Generator, drop: QDrop | None = None) -> Tensor:
        """Squared distance to the float answers on a random batch: this rank's share of it.

        It is summed over channels, which are the last axis where there are tokens, and averaged
        over the rest. Where memory is short the batch is taken in parts, see `Room.mean`.
        """
        return self._loss(self.upcoming.take(generator), drop)

    def held_out_loss(self, generator: torch.Generator) -> Tensor:
        """The same on images that are held out."""
        return self._loss(self.upcoming_held_out.take(generator), None)

    def _loss(self, batch: UnitRows, drop: QDrop | None) -> Tensor:
        if not batch.chosen:
            return torch.zeros(())
        first, _ = self.job.world.bounds(self.drawn)
        share = len(batch.chosen) / self.drawn
        state = drop.generator.get_state() if drop else torch.empty(0)

        def distance(span: slice) -> Tensor:
            if drop is not None:
                part = SamplePart(first + span.start, first + span.stop, self.drawn)
                drop.rewind(state, part)
            return share * self._distance(batch.part(span, self.job.device), drop)

        return self.job.room.mean(len(batch.chosen), distance)

    def _distance(self, batch: UnitRows, drop: QDrop | None) -> Tensor:
        with dropping(self.module, drop):
            answer = self.answer_to(batch, drop)
        losses: list[Tensor] = []
        for ours, ref in zip(leaves_of(answer), leaves_of(self.node.output), strict=True):
            if ref:
                error = (ours.float() - batch.targets[ref.id].float()).square()
                if self.fisher is not None and ref.id in self.batched:
                    tape = self.fisher.tapes[len(losses)]
                    weights = self.select(tape, batch.chosen).to(error.device)
                    error = error * weights / self.fisher.mean(len(losses))
                losses.append(error.sum(-1 if error.dim() == 3 else 1).mean())
        return reduce(torch.add, losses)

    @cached_property
    def upcoming(self) -> Upcoming[UnitRows]:
        """Random batches of the unit's data, of which this rank has its part."""
        return Upcoming(self.job.room, self.choose_learnt, self.gather)

    @cached_property
    def upcoming_held_out(self) -> Upcoming[UnitRows]:
        """The same of the images that are held out."""
        return Upcoming(self.job.room, self.choose_held_out, self.gather)

    def gather(self, chosen: Sequence[int]) -> UnitRows:
        """The values of these samples, on the CPU."""
        if not chosen:
            return UnitRows(chosen, self.batched, inputs={}, floating={}, targets={})
        floating = self.floating if self.job.settings.drop is not None else {}
        values = (self.inputs, floating, self.targets)
        parts = [{id: self.rows(each, id, chosen) for id, each in part.items()} for part in values]
        return UnitRows(chosen, self.batched, *parts)

    def answer(self, chosen: Sequence[int]) -> object:
        """The unit's own answer to these samples, which may be at different timesteps."""
        inputs = {id: self.rows(value, id, chosen) for id, value in self.inputs.items()}
        batch = UnitRows(chosen, self.batched, inputs, floating={}, targets={})
        return self.answer_to(batch.part(slice(None), self.job.device), None)

    def answer_to(self, batch: UnitRows, drop: QDrop | None) -> object:
        """The unit's own answer to samples that are on the device."""
        self.set_clock(batch.chosen)

        def value(leaf: object) -> object:
            return batch.input(leaf.id, drop) if isinstance(leaf, Ref) else leaf

        return self.module(*mapped(self.node.args, value), **mapped(self.node.kwargs, value))

    def answer_on_call(self, call: int, *, quantized: bool) -> object:
        """The unit's answer to all samples of one call, on quantized or on float inputs."""
        data = self if quantized else replace(self, inputs=self.floating)
        return data.answer(list(range(call * self.batch, (call + 1) * self.batch)))

    def set_clock(self, chosen: Sequence[int]) -> None:
        """Set the clock to the timesteps of these samples."""
        times = [self.calls[number // self.batch].timestep for number in chosen]
        clock = find_clock(self.job.model)
        clock.set(torch.tensor(times, dtype=torch.float64) / clock.ticks)

    def rows(self, value: Value, id: int, chosen: Sequence[int]) -> Any:
        """These samples of a value; a value without a batch axis is the same for all."""
        return self.select(value, chosen) if id in self.batched else value[0]

    def select(self, value: Value, chosen: Sequence[int]) -> Tensor:
        """These samples of a value with a batch axis; pinned on the way to a CUDA card."""
        # Several rows of a value can belong to one sample, such as the frames of a video.
        each = len(value[0]) // self.batch
        samples: list[Tensor] = []
        for number in chosen:
            first = number % self.batch * each
            samples.append(value[number // self.batch][first : first + each])
        joined = torch.cat(samples)
        return joined.pin_memory() if self.job.device.type == "cuda" else joined


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
        self.split = split_of(job, self.calls)
        self.store = Store(job.settings.memory)
        self.floating: dict[int, Value] = {}
        self.quantized: dict[int, Value] = {}
        self.units = {unit.name: unit for unit in stream_units(job, temporal=temporal)}
        self.weights = fisher_weights(job, self.units, self.store) if fisher else {}

    def walk(self) -> Iterator[UnitData]:
        """The data of each unit in forward order; its next item runs both streams through it."""
        self.feed()
        for place, node in enumerate(self.graph.nodes):
            unit = self.units.get(node.target) if isinstance(node.target, str) else None
            with self.job.visit(node.target):
                answers = self._run(place, self.floating, Precision.FLOAT)
                if unit:
                    yield self._unit_data(unit, node, answers)
                self.floating |= answers
                self.quantized |= self._run(place, self.quantized, self.precision)
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
            split=self.split,
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
    def _run(self, place: int, values: dict[int, Value], precision: Precision) -> dict[int, Value]:
        """Run one node on every call of one stream."""
        self._set_precision(self.graph.nodes[place], precision)
        outputs: dict[int, Value] = {}
        clock = find_clock(self.job.model)
        for number, call in enumerate(self.calls):
            clock.set(call.timestep / clock.ticks)
            run = partial(self._run_part, place, values, number)
            parts = self.job.room.each(len(call.arguments["timestep"]), run)
            for id, result in parts[0].items():
                if id not in outputs:
                    outputs[id] = Tape(self.store) if isinstance(result, Tensor) else []
                cut = len(parts) > 1 and id in self.batched
                if cut:
                    result = torch.cat([part[id] for part in parts], self._axis(id))
                outputs[id].append(result)
        return outputs

    def _axis(self, id: int) -> int:
        """The batch axis of a value: the one that is longer in a larger batch."""
        own = self.graph.values[id].shape
        larger = larger_graph(self.job).values[id].shape
        return next(axis for axis, size in enumerate(own) if size != larger[axis])

    def _run_part(
        self, place: int, values: dict[int, Value], number: int, span: slice
    ) -> dict[int, Any]:
        """Run one node on some samples of one call; the answers of a part wait on the CPU.

        The graph of a batch of this size has the same nodes, with its own shapes.
        """
        samples = len(self.calls[number].arguments["timestep"])
        whole = span.stop - span.start == samples
        graph = self.graph if whole else self.job.adapter.block_graph(span.stop - span.start)
        device = self.job.device

        def value(id: int) -> object:
            each = values[id][number]
            if not isinstance(each, Tensor):
                return each
            if not whole and id in self.batched:
                axis = self._axis(id)
                rows = each.shape[axis] // samples
                each = each.narrow(axis, span.start * rows, (span.stop - span.start) * rows)
            return each.to(device)

        results = run_node(graph.nodes[place], self.job.model, value, device)
        return results if whole else mapped(results, _on_the_cpu)


def stream_units(job: Job, *, temporal: bool) -> list[Unit]:
    """The units of a stream; with `temporal`, temporal layers belong to their blocks."""
    if temporal:
        return job.adapter.units_by_block(job.adapter.reads)
    return [unit for unit in job.adapter.units() if unit.kind != "temporal"]


def _on_the_cpu(value: object) -> object:
    return value.to(CPU) if isinstance(value, Tensor) else value


def _batched(graph: Graph, job: Job) -> frozenset[int]:
    """The values with a batch axis: their shape changes when the batch has one more sample."""
    larger = larger_graph(job)
    grown = (id for id, value in graph.values.items() if larger.values[id].shape != value.shape)
    return frozenset(grown)


def larger_graph(job: Job) -> Graph:
    """The graph of a call with one more sample."""
    return job.adapter.block_graph(len(job.calls[0].arguments["timestep"]) + 1)
