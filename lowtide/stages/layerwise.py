"""The layers of a block, one after the other, each with its calibration data, for AdaRound."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from lowtide.models import Unit
from lowtide.nn.layer_call import on_answer
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.stream import UnitData, UnitRows
from lowtide.stages.tape import Tape
from lowtide.stages.upcoming import Upcoming


@dataclass(frozen=True)
class LayerData:
    """One layer of a block: its inputs in the quantized block, its answers in the float block.

    The inputs depend on the layers before it, so they are computed when its turn has come.

    block: the calibration data of the block.
    unit: the layer as a unit of its own.
    """

    block: UnitData
    unit: Unit

    @property
    def layer(self) -> nn.Module:
        return self.block.job.model.get_submodule(self.unit.name)

    @cached_property
    def pairs(self) -> tuple[Tape, Tape]:
        """Inputs in the quantized block and answers in the float block, over all calls."""
        inputs = Tape(self.block.store)
        answers = Tape(self.block.store)
        with torch.no_grad():
            for call in range(len(self.block.calls)):
                x, _ = self._run_block(call, Precision.WEIGHTS)
                _, answer = self._run_block(call, Precision.FLOAT)
                inputs.append(x)
                answers.append(answer)
        set_precision(self.block.module, Precision.WEIGHTS)
        return inputs, answers

    def _run_block(self, call: int, precision: Precision) -> tuple[Tensor, Tensor]:
        """The layer's input and answer while the block runs on one call, float on float inputs."""
        pairs: list[tuple[Tensor, Tensor]] = []
        set_precision(self.block.module, precision)

        def record(module: nn.Module, given: Tensor, result: Tensor) -> None:
            pairs.append((given, result))

        hook = on_answer(self.layer, record)
        try:
            self.block.answer_on_call(call, quantized=precision.weights)
        finally:
            hook.remove()
        x, answer = pairs[0]
        samples = len(self.block.calls[call].arguments["timestep"])
        return x.expand(samples, *x.shape[1:]), answer.expand(samples, *answer.shape[1:])

    def loss(self, generator: torch.Generator) -> Tensor:
        """This rank's share of the squared distance on a random batch.

        It is summed over channels and averaged over the rest.
        """
        return self._loss(self.upcoming.take(generator))

    def held_out_loss(self, generator: torch.Generator) -> Tensor:
        """The same on images that are held out."""
        return self._loss(self.upcoming_held_out.take(generator))

    def _loss(self, batch: UnitRows) -> Tensor:
        if not batch.chosen:
            return torch.zeros(())
        return self.block.job.room.mean(len(batch.chosen), partial(self._share, batch))

    @cached_property
    def upcoming(self) -> Upcoming[UnitRows]:
        """Random batches of the layer's data."""
        return Upcoming(self.block.job.room, self.block.choose_learnt, self._gather)

    @cached_property
    def upcoming_held_out(self) -> Upcoming[UnitRows]:
        """The same of the images that are held out."""
        return Upcoming(self.block.job.room, self.block.choose_held_out, self._gather)

    def _gather(self, chosen: Sequence[int]) -> UnitRows:
        """Inputs and answers of these samples as the one value of each kind."""
        if not chosen:
            return UnitRows(chosen, frozenset(), inputs={}, floating={}, targets={})
        x, target = (self.block.select(tape, chosen) for tape in self.pairs)
        return UnitRows(chosen, frozenset([0]), inputs={0: x}, floating={}, targets={0: target})

    def _share(self, batch: UnitRows, span: slice) -> Tensor:
        part = batch.part(span, self.block.job.device)
        self.block.set_clock(part.chosen)
        channels = 1 if isinstance(self.layer, nn.Conv2d) else -1
        error = self.layer(part.inputs[0]).float() - part.targets[0].float()
        return error.square().sum(channels).mean() * (len(batch.chosen) / self.block.drawn)


def layers_of(block: UnitData) -> Iterator[LayerData]:
    """The layers of a block, in forward order."""
    for name in block.unit.layers:
        yield LayerData(block, replace(block.unit, name=name, layers=(name,)))
