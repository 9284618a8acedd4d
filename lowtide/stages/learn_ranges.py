"""LearnRanges: learn the input ranges of each unit through straight-through rounding (LSQ)."""

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import (
    ATTENTION_COPIES,
    BACKWARD_COPIES,
    DECODE,
    SLACK,
    rounding_inputs,
)
from lowtide.formats import Affine
from lowtide.models import Unit
from lowtide.nn.attention import QuantAttention
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock
from lowtide.stages.base import Job, Stage
from lowtide.stages.reconstruct import JUDGES, Loss, descend
from lowtide.stages.stream import Stream, stream_units
from lowtide.validation import Count

RANGE_ITERS = 100  # where a paper learns ranges and the settings give no number
RANGE_RATE = 1e-2
LEARN_RANGES = "LearnRanges"


@dataclass(frozen=True)
class LearnRanges(Stage):
    """Learn the input ranges of every unit through straight-through rounding (LSQ).

    Zero points are fixed, and the weights are finished.

    iters: None takes the settings' range_iters.
    temporal: temporal layers learn with their blocks.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"calibration_steps", "batch", "range_iters"})

    iters: Count | None = None
    temporal: bool = False

    def run(self, job: Job) -> None:
        stream = Stream(job, inputs_quantized=True, temporal=self.temporal)
        iters = self.iters or job.settings.range_iters
        for data in job.track(stream.walk(), "learning input ranges", len(stream.units)):
            RangeLearner(job, data.unit, iters, data.held_out_loss).learn(data.loss)

    def cost(self, load: Workload) -> Cost:
        """As Reconstruct, with rounded inputs."""
        iters = self.iters or load.settings.range_iters
        samples = load.samples
        seconds = 0.0
        largest = 0.0
        for part in load.network.by_unit.values():
            work = part.forward.of(samples) + rounding_inputs(part, samples)
            work += Work(values=DECODE * part.weights)
            forward = load.speed.forward(work)
            seconds += iters * (forward + load.speed.backward(work)) + 2 * JUDGES * forward
            kept = part.kept + 3 * part.reads + 2 * ATTENTION_COPIES * part.scores
            values = BACKWARD_COPIES * samples * kept + DECODE * part.weights
            largest = max(largest, SLACK * FLOAT * values)
        streams = load.streams(rounding_inputs(load.network.whole, load.batch))
        return Cost(seconds + streams, largest + load.tape_bytes())

    def summary(self, job: Job) -> str:
        units = stream_units(job, temporal=self.temporal)
        return f"input ranges of {len(units)} blocks learnt"


class RangeLearner:
    """Learns the scales of the input quantizers of one unit's own layers and attentions.

    Samples are of the kept steps alone. The scale of a step between two of them changes by a share
    between theirs.
    """

    def __init__(self, job: Job, unit: Unit, iters: int, judged: Loss):
        self.job = job
        self.unit = unit
        self.iters = iters
        self.judged = judged
        quantizers: list[Quantizer] = []
        for name in unit.layers:
            layer = job.model.get_submodule(name)
            if isinstance(layer, QuantizedLayer):
                quantizers.append(layer.input)
        for module in job.model.get_submodule(unit.name).modules():
            if isinstance(module, QuantAttention):
                quantizers += module.quantizers().values()
        self.quantizers = [each for each in quantizers if isinstance(each.format, Affine)]

    def learn(self, loss: Loss) -> None:
        """Learn, or take the result of an earlier run."""
        if not self.quantizers:
            return
        scales = self.job.recorded(LEARN_RANGES, self.unit.name)
        if scales is None:
            self.search(loss)
            learnt = {str(row): each.scale for row, each in enumerate(self.quantizers)}
            scales = self.job.agreed(LEARN_RANGES, self.unit.name, learnt)
        self._restore([scales[str(row)] for row in range(len(self.quantizers))])

    def search(self, loss: Loss) -> None:
        """Learn, and keep the result only where it beats the ranges before."""
        before = [quantizer.scale.clone() for quantizer in self.quantizers]
        start = self.judge(self.judged)
        self._minimise(loss)
        steps = self._kept_steps()
        for quantizer, old in zip(self.quantizers, before, strict=True):
            quantizer.finish_learning()
            if quantizer.per_step:
                quantizer.scale.copy_(carried(old, quantizer.scale, steps))
        after = self.judge(self.judged)
        self.job.report.setdefault("losses", {})[f"{LEARN_RANGES} {self.unit.name}"] = [
            start,
            after,
        ]
        if after > start:
            self._restore(before)

    def _minimise(self, loss: Loss) -> None:
        generator = self.job.generator(LEARN_RANGES, self.unit.name)
        scales = [quantizer.start_learning() for quantizer in self.quantizers]
        optimizer = torch.optim.Adam(scales, RANGE_RATE)
        for _ in range(self.iters):
            optimizer.zero_grad()
            descend(self.job, partial(loss, generator), scales, optimizer.zero_grad)
            optimizer.step()

    def _kept_steps(self) -> list[int]:
        known = find_clock(self.job.model).known
        return sorted({known[call.timestep] for call in self.job.calls if call.kept})

    def _restore(self, scales: list[Tensor]) -> None:
        for quantizer, scale in zip(self.quantizers, scales, strict=True):
            quantizer.scale.copy_(scale)

    @torch.no_grad()
    def judge(self, loss: Loss) -> float:
        """The loss on a few batches, the same ones at each call."""
        generator = self.job.generator(LEARN_RANGES, self.unit.name, "judge")
        return self.job.world.total(sum(loss(generator).item() for _ in range(JUDGES)) / JUDGES)


def carried(old: Tensor, new: Tensor, steps: list[int]) -> Tensor:
    """The scales of all steps, (steps,), from those learnt at some steps.

    Between two of these, the change, as a share of the old scale, is interpolated.
    """
    change = (new / old).log().cpu().double().numpy()
    changes = np.interp(np.arange(len(old)), steps, change[steps])
    return old * torch.from_numpy(changes).exp().to(old)
