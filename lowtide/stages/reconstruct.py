"""Reconstruct: learn the rounding of each unit so that it answers like the float model; the only such loop in the house.

AdaRound (Nagel et al. 2020) block by block (BRECQ, Li et al. 2021): the unit reads its predecessors' quantized outputs and
is held to the float model's answers on float inputs. Step sizes stay fixed. Random batches depend on (seed, stage, unit).
Settings turn it into its relatives: layer by layer (AdaRound itself), or on inputs that are rounded by chance (QDrop, whose
ranges are those of plain rounding here and are fitted anew afterwards).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import (
    ATTENTION_COPIES,
    BACKWARD_COPIES,
    DECODE,
    SLACK,
    rounding_bytes,
    rounding_inputs,
    rounding_work,
)
from lowtide.formats import Affine
from lowtide.machine.bf16 import bf16_products, words
from lowtide.models import Unit
from lowtide.nn.attention import QuantAttention
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Drop, Quantizer
from lowtide.nn.rounding import Roundings
from lowtide.nn.swap import find_clock
from lowtide.stages.base import Job, Stage
from lowtide.stages.fit_ranges import FitRanges, watching_cost
from lowtide.stages.layerwise import layers_of
from lowtide.stages.stream import Stream
from lowtide.validation import Count, Within

PAPER_ITERS, PAPER_RATE = 20_000, 1e-3
PENALTY, WARM_UP, SHARP_FIRST, SHARP_LAST = 0.01, 0.2, 20.0, 2.0
JUDGES = 4
RANGE_ITERS = 100  # where a paper learns ranges and the settings do not say for how long
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Reconstruct(Stage):
    """Round every unit in forward order; temporal layers with their blocks, unless a stage before maintained them.

    A later `round` starts warm from what the rounds before decided, and spends half the iterations of the one before.
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {"calibration_steps", "iters", "batch", "scope", "drop", "early_stop"}
    )

    round: Annotated[int, Within(0)] = 0

    def run(self, job: Job) -> None:
        drops = job.settings.drop is not None
        if drops and not self.round:
            FitRanges("minmax").run(job)
        if "products" not in job.report:
            job.report["products"] = words(next(job.model.parameters()))
            job.console.print(f"Roundings are learnt with {job.report['products']}")
        stream = Stream(job, inputs_quantized=drops, temporal=not job.maintained)
        name = f"Reconstruct{self.round}" if self.round else "Reconstruct"
        for scene in job.track(stream.scenes(), "rounding blocks", len(stream.units)):
            job.report["largest_block_bytes"] = max(
                job.report.get("largest_block_bytes", 0), scene.bytes()
            )
            iters = max(1, job.settings.iters >> self.round)
            for part in layers_of(scene) if job.settings.scope == "layer" else (scene,):
                Learner(job, name, part.unit, iters, warm=self.round > 0).learn(part.loss)

    def cost(self, load: Workload) -> Cost:
        """Both streams run through the network once; each unit learns, judged before and after."""
        iters = max(1, load.settings.iters >> self.round)
        units = load.network.by_unit.values()
        samples = load.samples
        learning = sum(iters * load.speed.learning(rounding_work(part, samples)) for part in units)
        judging = sum(2 * JUDGES * load.forward(part, samples) for part in units)
        largest = max(rounding_bytes(part, samples) for part in units)
        ranges = 0 if load.settings.drop is None else watching_cost(load, search=False).seconds
        return Cost(ranges + learning + judging + load.streams(), largest + load.tape_bytes())


@dataclass(frozen=True)
class LearnRanges(Stage):
    """Learn the input ranges of every unit through straight-through rounding (LSQ), zero points fixed, weights done."""

    reads: ClassVar[frozenset[str]] = frozenset({"calibration_steps", "batch", "range_iters"})

    iters: Count | None = None
    temporal: bool = False

    def run(self, job: Job) -> None:
        stream = Stream(job, inputs_quantized=True, temporal=self.temporal)
        for scene in job.track(stream.scenes(), "learning input ranges", len(stream.units)):
            RangeLearner(job, scene.unit, self.iters or job.settings.range_iters).learn(scene.loss)

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


def rate(iters: int) -> float:
    """Adam's rate: the paper's at the paper's 20,000 iterations, larger as they shrink, so that weights can still cross."""
    return PAPER_RATE * max(1.0, PAPER_ITERS / iters) ** 0.75


class Learner:
    """Learns the rounding of one unit's layers, keeps it only where it beats nearest, and records it for a resumed run."""

    def __init__(self, job: Job, stage: str, unit: Unit, iters: int, warm: bool = False):
        self.job, self.stage, self.unit, self.iters, self.warm = job, stage, unit, iters, warm
        modules = {name: job.model.get_submodule(name) for name in unit.layers}
        self.layers: dict[str, QuantizedLayer] = {
            name: layer
            for name, layer in modules.items()
            if isinstance(layer, QuantizedLayer) and layer.format
        }

    @property
    def low(self) -> bool:
        """Whether bf16 will do: not for time, whose precision is the point; a model that came in fewer bits has its own."""
        return self.unit.kind != "temporal" and all(
            layer.weight.dtype == torch.float32 for layer in self.layers.values()
        )

    def learn(self, loss: Loss) -> None:
        """`loss(generator)` is the unit's distance from the float model on a random batch; `loss(generator, drop)` drops."""
        if not self.layers:
            return
        found = self.job.recorded(self.stage, self.unit.name)
        if found is None:
            found = self.search(loss)
            self.job.record(self.stage, self.unit.name, found)
        for name, layer in self.layers.items():
            layer.set_codes(found[name])

    def search(self, loss: Loss) -> dict[str, Tensor]:
        nearest, before = self.codes(), self.judge(loss)
        roundings = Roundings(
            [layer.start_rounding(self.warm) for layer in self.layers.values()], rate(self.iters)
        )
        self.minimise(loss, roundings)
        for layer in self.layers.values():
            layer.finish_rounding()
        after = self.judge(loss)
        self.job.report.setdefault("losses", {})[f"{self.stage} {self.unit.name}"] = [before, after]
        return self.codes() if after < before else nearest

    def codes(self) -> dict[str, Tensor]:
        return {name: layer.codes for name, layer in self.layers.items()}

    @torch.no_grad()
    def judge(self, loss: Loss) -> float:
        """The loss on the same few batches before and after."""
        generator = self.job.generator(self.stage, self.unit.name, "judge")
        return sum(loss(generator).item() for _ in range(JUDGES)) / JUDGES

    def minimise(self, loss: Loss, roundings: Roundings) -> None:
        iters, generator = self.iters, self.job.generator(self.stage, self.unit.name)
        # Dropped only in blocks: a temporal unit is learnt on its own few inputs as they are.
        chance = None if self.unit.kind == "temporal" else self.job.settings.drop
        drop = (
            ()
            if chance is None
            else (Drop(chance, self.job.generator(self.stage, self.unit.name, "drop")),)
        )
        history: list[float] = []
        for step in range(iters):
            penalty = PENALTY if step >= WARM_UP * iters else 0.0
            distance = self.iterate(
                lambda: loss(generator, *drop),
                roundings,
                penalty,
                sharpness(step / iters, self.warm),
            )
            history.append(distance.item())
            if self.job.settings.early_stop and settled(history, roundings):
                break

    def iterate(
        self, loss: Callable[[], Tensor], roundings: Roundings, penalty: float, sharpness: float
    ) -> Tensor:
        """One iteration; the loss before it."""
        with bf16_products(roundings.device, self.low):
            distance = loss()
        distance.backward()
        roundings.step(penalty, sharpness)
        return distance


def sharpness(progress: float, warm: bool = False) -> float:
    """b of the penalty: 20 at the end of the warm-up, 2 at the end. Decisions that are made already begin half-way."""
    if warm:
        return SHARP_LAST + (SHARP_FIRST - SHARP_LAST) / 2 * (1 - progress)
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return SHARP_LAST + (SHARP_FIRST - SHARP_LAST) * (1 - done)


def settled(history: list[float], roundings: Roundings, window: int = 100) -> bool:
    """The loss is flat and every weight has decided; looked at once in a window, because looking costs a pass."""
    if len(history) < 2 * window or len(history) % window:
        return False
    late, early = sum(history[-window:]), sum(history[-2 * window : -window])
    return late > 0.99 * early and roundings.settled()


class RangeLearner:
    """Learns the scales of the input quantizers of one unit's own layers and attentions.

    Samples are of the kept steps alone; a step between two of them takes of their changes what lies between.
    """

    def __init__(self, job: Job, unit: Unit, iters: int):
        self.job, self.unit, self.iters = job, unit, iters
        layers = [
            job.model.get_submodule(name).input
            for name in unit.layers
            if isinstance(job.model.get_submodule(name), QuantizedLayer)
        ]
        attentions = [
            module
            for module in job.model.get_submodule(unit.name).modules()
            if isinstance(module, QuantAttention)
        ]
        parts = [part for attention in attentions for part in attention.quantizers().values()]
        self.quantizers: list[Quantizer] = [
            each for each in (*layers, *parts) if isinstance(each.format, Affine)
        ]

    def learn(self, loss: Loss) -> None:
        if not self.quantizers:
            return
        found = self.job.recorded("LearnRanges", self.unit.name)
        if found is None:
            self.search(loss)
            self.job.record(
                "LearnRanges",
                self.unit.name,
                {str(row): each.scale for row, each in enumerate(self.quantizers)},
            )
        else:
            self.take([found[str(row)] for row in range(len(self.quantizers))])

    def search(self, loss: Loss) -> None:
        """Learn, and keep it only where it beats the ranges that were there."""
        generator = self.job.generator("LearnRanges", self.unit.name)
        before = [quantizer.scale.clone() for quantizer in self.quantizers]
        start = self.judge(loss)
        optimizer = torch.optim.Adam(
            [quantizer.start_learning() for quantizer in self.quantizers], 1e-2
        )
        for _ in range(self.iters):
            optimizer.zero_grad()
            loss(generator).backward()
            optimizer.step()
        seen = self.seen_steps()
        for quantizer, old in zip(self.quantizers, before, strict=True):
            quantizer.finish_learning()
            if quantizer.per_step:
                quantizer.scale.copy_(carried(old, quantizer.scale, seen))
        after = self.judge(loss)
        self.job.report.setdefault("losses", {})[f"LearnRanges {self.unit.name}"] = [start, after]
        if after > start:
            self.take(before)

    def seen_steps(self) -> list[int]:
        known = find_clock(self.job.model).known
        return sorted({known[call.timestep] for call in self.job.calls if call.kept})

    def take(self, scales: list[Tensor]) -> None:
        for quantizer, scale in zip(self.quantizers, scales, strict=True):
            quantizer.scale.copy_(scale)

    @torch.no_grad()
    def judge(self, loss: Loss) -> float:
        generator = self.job.generator("LearnRanges", self.unit.name, "judge")
        return sum(loss(generator).item() for _ in range(JUDGES)) / JUDGES


def carried(old: Tensor, new: Tensor, seen: list[int]) -> Tensor:
    """What was learnt at the steps that were seen, for those between: the change, as a share, runs evenly across."""
    change = (new / old).log().cpu().double().numpy()
    return old * torch.from_numpy(np.interp(np.arange(len(old)), seen, change[seen])).exp().to(old)
