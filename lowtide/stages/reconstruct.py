"""Reconstruct: learn the rounding of each unit so that it answers like the float model.

AdaRound (Nagel et al. 2020), block by block (BRECQ, Li et al. 2021): a unit reads the quantized
outputs of the units before it, and its target is the float model's answer on float inputs. Scales
stay fixed. Random batches depend on (seed, stage, unit). Settings choose its relatives: layer by
layer (AdaRound itself), or inputs of which each value is rounded or not by chance (QDrop; here its
ranges are those of rounding to nearest, and are fitted anew afterwards). All errors of a unit count
alike unless `fisher` weighs them, as BRECQ does. No other stage has such a loop.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.costs.workload import (
    rounding_bytes,
    rounding_work,
)
from lowtide.errors import BadInput
from lowtide.machine.bf16 import describe_products, products
from lowtide.models import Unit
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import QDrop
from lowtide.nn.rounding import RoundingOptimizer
from lowtide.settings import Settings
from lowtide.stages.base import Job, Stage
from lowtide.stages.fisher import gradient_cost
from lowtide.stages.fit_ranges import FitRanges, statistics_cost
from lowtide.stages.layerwise import LayerData, layers_of
from lowtide.stages.stream import Stream, UnitData, stream_units
from lowtide.validation import Within

PAPER_ITERS = 20_000
PAPER_RATE = 1e-3
PENALTY = 0.01
WARM_UP = 0.2  # the share of the iterations without the penalty
SHARP_FIRST = 20.0
SHARP_LAST = 2.0
LOSSES = "losses "  # before the names of tensors of a record that are no codes
JUDGES = 4  # batches that judge a unit before and after
# loss(generator) is the unit's distance from the float model on a random batch;
# loss(generator, drop) is the same with inputs of which some values are not rounded.
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Reconstruct(Stage):
    """Learn the rounding of every unit in forward order.

    Temporal layers are learnt with their blocks, unless an earlier stage maintained them.

    round: a later round starts from the decisions of the rounds before, with half the iterations
        of the one before.
    fisher: weigh a unit's errors by the squared gradients of the answer, as BRECQ does. It takes
        one float pass forward and backward for each kept call (stages/fisher.py).
    """

    reads: ClassVar[frozenset[str]] = frozenset(
        {"calibration_steps", "iters", "batch", "scope", "drop", "early_stop"}
    )

    round: Annotated[int, Within(0)] = 0
    fisher: bool = False

    def check(self, settings: Settings) -> None:
        if self.fisher and settings.scope == "layer":
            raise BadInput(
                "found fisher with scope layer",
                "blocks, whose answers the gradients are of",
                "leave one of them out",
            )

    def run(self, job: Job) -> None:
        drops = job.settings.drop is not None
        if drops and not self.round:
            FitRanges("minmax").run(job)
        _report_products(job)
        temporal = not job.maintained
        stream = Stream(job, inputs_quantized=drops, temporal=temporal, fisher=self.fisher)
        name = f"Reconstruct{self.round}" if self.round else "Reconstruct"
        iters = max(1, job.settings.iters >> self.round)
        for data in job.track(stream.walk(), "rounding blocks", len(stream.units)):
            largest = job.report.get("largest_block_bytes", 0)
            job.report["largest_block_bytes"] = max(largest, data.bytes())
            for part in _parts(data, job.settings.scope):
                judged = part.held_out_loss
                learner = Learner(job, name, part.unit, iters, warm=self.round > 0, judged=judged)
                learner.learn(part.loss)

    def cost(self, load: Workload) -> Cost:
        """One pass of both streams; each unit learns, and is judged before and after."""
        iters = max(1, load.settings.iters >> self.round)
        units = load.network.by_unit.values()
        samples = load.samples
        learning = sum(iters * load.speed.learning(rounding_work(part, samples)) for part in units)
        judging = sum(2 * JUDGES * load.forward(part, samples) for part in units)
        largest = max(rounding_bytes(part, samples, load.width) for part in units)
        ranges = 0 if load.settings.drop is None else statistics_cost(load, search=False).seconds
        seconds = ranges + learning + judging + load.streams()
        gradients = gradient_cost(load) if self.fisher else Cost()
        bytes = max(largest + load.tape_bytes(), gradients.bytes)
        return Cost(seconds + gradients.seconds, bytes)

    def summary(self, job: Job) -> str:
        units = stream_units(job, temporal=not job.maintained)
        return f"rounding of {len(units)} blocks learnt"


def _parts(data: UnitData, scope: str) -> Iterable[UnitData | LayerData]:
    """What is learnt at once: the whole unit, or each of its layers."""
    return layers_of(data) if scope == "layer" else (data,)


def _report_products(job: Job) -> None:
    """Say once in which precision the products of the learning run."""
    if "products" not in job.report:
        parameter = next(job.model.parameters())
        low = job.conditions.bf16
        job.report["products"] = job.world.of_first(lambda: describe_products(parameter, low=low))
        job.say(f"Reconstruct: the rounding is learnt with {job.report['products']}")


def rate(iters: int) -> float:
    """Adam's rate: the paper's at its 20,000 iterations, larger with fewer iterations.

    With the paper's rate and few iterations, a weight could not cross to its other code.
    """
    return PAPER_RATE * max(1.0, PAPER_ITERS / iters) ** 0.75


class Learner:
    """Learns the rounding of one unit's layers.

    The result is kept only where it beats rounding to nearest, and is recorded for a resumed run.

    warm: start from the decisions made before.
    judged: the loss that judges the result; the one that is learnt from if there is none.
    """

    def __init__(
        self,
        job: Job,
        stage: str,
        unit: Unit,
        iters: int,
        *,
        warm: bool = False,
        judged: Loss | None = None,
    ):
        self.job = job
        self.stage = stage
        self.unit = unit
        self.iters = iters
        self.warm = warm
        self.judged = judged
        self.draws: list[torch.Generator] = []
        self.layers: dict[str, QuantizedLayer] = {}
        for name in unit.layers:
            layer = job.model.get_submodule(name)
            if isinstance(layer, QuantizedLayer) and layer.format:
                self.layers[name] = layer

    @property
    def low(self) -> bool:
        """Whether bf16 products are precise enough.

        They are not for the temporal block. A model in half precision has its own products.
        """
        return self.unit.kind != "temporal" and all(
            layer.weight.dtype == torch.float32 for layer in self.layers.values()
        )

    def learn(self, loss: Loss) -> None:
        """Learn, or take the result of an earlier run."""
        if not self.layers:
            return
        codes = self.job.recorded(self.stage, self.unit.name)
        if codes is None:
            found = with_losses(self.search(loss), self.job, f"{self.stage} {self.unit.name}")
            codes = self.job.agreed(self.stage, self.unit.name, found)
        report_losses(codes, self.job)
        self.take(codes)

    def take(self, codes: dict[str, Tensor]) -> None:
        """Set the codes of each layer."""
        for name, layer in self.layers.items():
            layer.set_codes(codes[name].to(layer.weight.device))

    def search(self, loss: Loss) -> dict[str, Tensor]:
        """The codes of each layer: learnt ones, or those before where the loss is not lower."""
        judged = self.judged or loss
        nearest = self.codes()
        before = self.judge(judged)
        layers = self.layers.values()
        self.minimise(loss, self._started())
        for layer in layers:
            layer.finish_rounding()
        after = self.judge(judged)
        self.job.report.setdefault("losses", {})[f"{self.stage} {self.unit.name}"] = [before, after]
        return self.codes() if after < before else nearest

    def _started(self) -> RoundingOptimizer:
        """The roundings of all layers, which nothing else refers to once they have learnt."""
        started = [layer.start_rounding(warm=self.warm) for layer in self.layers.values()]
        return RoundingOptimizer(started, rate(self.iters))

    def codes(self) -> dict[str, Tensor]:
        """The codes of each layer now."""
        codes: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            assert layer.codes is not None
            codes[name] = layer.codes
        return codes

    @torch.no_grad()
    def judge(self, loss: Loss) -> float:
        """The loss on a few batches, the same ones at each call."""
        generator = self.job.generator(self.stage, self.unit.name, "judge")
        return self.job.world.total(sum(loss(generator).item() for _ in range(JUDGES)) / JUDGES)

    def minimise(self, loss: Loss, roundings: RoundingOptimizer) -> None:
        """Train the roundings."""
        generator = self.job.generator(self.stage, self.unit.name)
        drop = self._drop()
        self.draws = [each.generator for each in drop]
        history: list[float] = []
        for step in range(self.iters):
            penalty = PENALTY if step >= WARM_UP * self.iters else 0.0
            sharp = sharpness(step / self.iters, warm=self.warm)
            distance = self.iterate(lambda: loss(generator, *drop), roundings, penalty, sharp)
            history.append(distance.item())
            if self.job.settings.early_stop and settled(history, roundings):
                break

    def _drop(self) -> tuple[QDrop, ...]:
        """QDrop, where the settings choose it and the unit is a block.

        A temporal unit learns on its own few inputs as they are.
        """
        chance = self.job.settings.drop
        if chance is None or self.unit.kind == "temporal":
            return ()
        return (QDrop(chance, self.job.generator(self.stage, self.unit.name, "drop")),)

    def iterate(
        self,
        loss: Callable[[], Tensor],
        roundings: RoundingOptimizer,
        penalty: float,
        sharpness: float,
    ) -> Tensor:
        """One iteration; the loss before it."""

        def low_loss() -> Tensor:
            with products(roundings.device, low=self.low and self.job.conditions.bf16):
                return loss()

        learnt = [each.weight for each in roundings.each]
        distance = descend(self.job, low_loss, learnt, roundings.forget_gradients, self.draws)
        roundings.step(penalty, sharpness)
        return distance


def with_losses(codes: Mapping[str, Tensor], job: Job, *names: str) -> dict[str, Tensor]:
    """The codes, and the losses before and after of these parts of the work, for a record."""
    known = job.report.get("losses", {})
    pairs = {name: known[name] for name in names if name in known}
    kept = {LOSSES + name: torch.tensor(pair, dtype=torch.float64) for name, pair in pairs.items()}
    return {**codes, **kept}


def report_losses(record: Mapping[str, Tensor], job: Job) -> None:
    """Report the losses of a record, which may be of an interrupted run."""
    losses = job.report.setdefault("losses", {})
    for name, pair in record.items():
        if name.startswith(LOSSES):
            losses[name.removeprefix(LOSSES)] = pair.tolist()


def descend(
    job: Job,
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    undo: Callable[[], object],
    draws: Iterable[torch.Generator] = (),
) -> Tensor:
    """The gradients of the loss over all ranks; the loss over all ranks.

    A rank without samples has a loss of zero that depends on nothing. `undo` and `draws`: see
    `Room.descend`.
    """
    return job.world.sum_gradients(job.room.descend(loss, undo, draws), parameters)


def sharpness(progress: float, *, warm: bool = False) -> float:
    """b of the penalty: 20 at the end of the warm-up, 2 at the end of the learning.

    A warm start begins half-way, because its decisions are made already.
    """
    if warm:
        return SHARP_LAST + (SHARP_FIRST - SHARP_LAST) / 2 * (1 - progress)
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return SHARP_LAST + (SHARP_FIRST - SHARP_LAST) * (1 - done)


def settled(history: list[float], roundings: RoundingOptimizer, window: int = 100) -> bool:
    """Whether the loss is flat and every weight is decided.

    It looks once in a window, because a look takes a pass over the weights.
    """
    if len(history) < 2 * window or len(history) % window:
        return False
    late = sum(history[-window:])
    early = sum(history[-2 * window : -window])
    return late > 0.99 * early and roundings.settled()
