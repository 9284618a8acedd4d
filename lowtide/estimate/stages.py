"""What each stage costs: seconds on this machine, and the most bytes it holds beside weights and recorded calls.

The numbers of passes are the stages' own; the constants below say what a pass over weights or inputs amounts to.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from lowtide.estimate.blueprint import Blueprint
from lowtide.estimate.speed import Speed
from lowtide.estimate.work import FLOAT, Network, Part, Work
from lowtide.methods.mpq import OMQ, PATCHES, TRD, mixes
from lowtide.methods.ptq4dm import NDTC
from lowtide.methods.ptqd import CNC, VSC, Bias, StepAware
from lowtide.methods.qdiffusion import Split
from lowtide.methods.tcaq import DAQ, PAR, ROWS, TCR
from lowtide.methods.temporal_cache import Maintain
from lowtide.methods.tfmq import FSC
from lowtide.models import Unit
from lowtide.models.trace import flat_inputs
from lowtide.settings import Settings
from lowtide.stages.assign import Assign, weight_format
from lowtide.stages.base import Stage
from lowtide.stages.collect import LARGEST_BATCH, Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import KEPT_VALUES, TAILS, FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import JUDGES, LearnRanges, Reconstruct
from lowtide.stages.temporal_features import MOST_ROWS
from lowtide.stages.tiar import TIAR

DECODE, ROUND, WATCH = (
    3,
    8,
    2,
)  # passes over a weight to decode it, over an input to round it, or to see its ends
LEARNT_CALLS, MERGED_CALLS = (
    5,
    20,
)  # small calls that a layer adds to an iteration while its rounding, or its change, is learnt
LEARNT_BYTES, STUDENT_BYTES = (
    60,
    40,
)  # of one weight while its rounding, or its low-rank change, is learnt
ATTENTION_COPIES = 3  # of a softmax, where attention is computed step by step to round its parts
WATCHED_COPIES = 2  # of it, where its parts are only looked at
BACKWARD_COPIES = (
    1.25  # of a unit's values: kept for the backward pass, and the few gradients alive at a time
)
SLACK = 1.25  # what the allocator holds above what is asked for
WARM = 32 << 20  # torch's own buffers, once a network has run


@dataclass(frozen=True)
class Cost:
    """Seconds, and bytes while it runs."""

    seconds: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Workload:
    """How much is to be done: the network's work, the settings, and the calls of the denoiser that calibration makes."""

    blueprint: Blueprint
    network: Network
    settings: Settings
    speed: Speed

    @cached_property
    def batch(self) -> int:
        """Samples of one call of the denoiser."""
        images = max(
            size for size in range(1, LARGEST_BATCH + 1) if self.settings.images % size == 0
        )
        return images * self.branches

    @cached_property
    def branches(self) -> int:
        return self.blueprint.branches(self.settings)

    @cached_property
    def steps(self) -> int:
        """Calls for one image."""
        return len(self.blueprint.timesteps(self.settings))

    @property
    def batches(self) -> int:
        return self.settings.images * self.branches // self.batch

    @property
    def calls(self) -> int:
        return self.steps * self.batches

    @property
    def kept(self) -> int:
        """Calls whose inputs serve reconstruction."""
        return min(self.settings.calibration_steps, self.steps) * self.batches

    @property
    def learnt(self) -> int:
        """Samples of one iteration."""
        return min(self.settings.batch, self.kept * self.batch)

    @cached_property
    def inputs(self) -> tuple[float, float]:
        """Bytes of one sample's inputs: the part that changes with the step, and all of it."""
        given = flat_inputs(self.network.adapter.architecture.example(self.network.adapter.meta, 2))
        shared = self.network.adapter.architecture.shared
        sizes = {
            name: value.numel() * FLOAT / (1 if name in shared else 2)
            for name, value in given.items()
        }
        return sizes[self.network.adapter.parameters[0]], sum(sizes.values())

    def forward(self, part: Part, samples: float) -> float:
        return self.speed.forward(part.forward.of(samples))

    def alive(self, samples: float) -> float:
        """Bytes of a forward pass."""
        return SLACK * FLOAT * samples * self.network.alive

    def pass_over(self, calls: int, each: Work | None = None) -> float:
        """Seconds of the whole network over so many calls, with something added to each."""
        work = self.network.whole.forward.of(self.batch) + (each or Work())
        return calls * self.speed.forward(work)

    def decoding(self) -> Work:
        """What quantized weights add to a call."""
        whole = self.network.whole
        return Work(values=DECODE * whole.weights, calls=DECODE * whole.layers)

    def recorded(self) -> float:
        """Bytes of the calls that are kept until the end."""
        changing, whole = self.inputs
        return self.batch * (self.calls * changing + self.batches * (whole - changing))


def collect(stage: Collect, load: Workload) -> Cost:
    """While a batch is drawn, every argument of all its calls is held, and every answer."""
    changing, whole = load.inputs
    return Cost(
        load.pass_over(load.calls),
        load.alive(load.batch) + load.steps * load.batch * (whole + changing),
    )


def fit_weights(stage: FitWeights, load: Workload) -> Cost:
    whole = load.network.whole
    each = load.speed.search if stage.search == "mse" else WATCH * load.speed.value
    return Cost(whole.weights * each, 4 * FLOAT * whole.largest)


def rows_of(unit: Unit, load: Workload) -> int:
    """Timesteps, or (timestep, condition) pairs, that a temporal unit is run on."""
    if unit.reads == ("timestep",):
        return load.steps
    return min(MOST_ROWS, load.steps * load.settings.images * load.branches)


def tiar(stage: TIAR, load: Workload) -> Cost:
    """Every temporal unit on all its rows, over and over."""
    found = [
        (load.network.temporal_part(unit), rows_of(unit, load)) for unit in load.network.temporal
    ]
    iters = stage.times * load.settings.iters
    seconds = sum(iters * load.speed.learning(learnt_work(part, rows)) for part, rows in found)
    return Cost(seconds, max((learnt_bytes(part, rows) for part, rows in found), default=0))


def learnt_work(part: Part, samples: float) -> Work:
    """One iteration of learning a unit's rounding."""
    return part.forward.of(samples) + Work(weights=part.weights, calls=LEARNT_CALLS * part.layers)


def learnt_bytes(part: Part, samples: float) -> float:
    values = BACKWARD_COPIES * samples * part.kept
    return SLACK * (FLOAT * values + LEARNT_BYTES * part.weights)


def reconstruct(stage: Reconstruct, load: Workload) -> Cost:
    """Both streams through the network once; at each unit, iterations and a judgement before and after."""
    iters, units = max(1, load.settings.iters >> stage.round), load.network.by_unit.values()
    learning = sum(iters * load.speed.learning(learnt_work(part, load.learnt)) for part in units)
    judging = sum(2 * JUDGES * load.forward(part, load.learnt) for part in units)
    most = max(learnt_bytes(part, load.learnt) for part in units)
    ranges = 0 if load.settings.drop is None else watching(load, False).seconds
    return Cost(ranges + learning + judging + streaming(load), most + tapes(load))


def streaming(load: Workload, rounded: Work | None = None) -> float:
    """Seconds of the float and the quantized stream."""
    return load.pass_over(load.kept) + load.pass_over(
        load.kept, load.decoding() + (rounded or Work())
    )


def tapes(load: Workload) -> float:
    """Bytes of both streams in memory; the rest goes to disk."""
    return min(load.settings.memory, 2 * FLOAT * load.kept * load.batch * load.network.streamed)


def rounding_inputs(part: Part, samples: float) -> Work:
    """Every input on its grid, and attention step by step."""
    return Work(
        values=samples * (ROUND * part.reads + 2 * ROUND * part.scores), calls=ROUND * part.layers
    )


def learn_ranges(stage: LearnRanges, load: Workload) -> Cost:
    iters, units = stage.iters or load.settings.range_iters, load.network.by_unit.values()
    seconds, most = 0.0, 0.0
    for part in units:
        work = part.forward.of(load.learnt) + rounding_inputs(part, load.learnt)
        work += Work(values=DECODE * part.weights)
        seconds += iters * (
            load.speed.forward(work) + load.speed.backward(work)
        ) + 2 * JUDGES * load.speed.forward(work)
        kept = part.kept + 3 * part.reads + 2 * ATTENTION_COPIES * part.scores
        most = max(
            most, SLACK * FLOAT * (BACKWARD_COPIES * load.learnt * kept + DECODE * part.weights)
        )
    return Cost(
        seconds + streaming(load, rounding_inputs(load.network.whole, load.batch)),
        most + tapes(load),
    )


def fit_ranges(stage: FitRanges, load: Workload) -> Cost:
    """Every recorded call with quantized weights; where the range is searched, a sample of all values too."""
    searched = stage.search != "minmax"
    return watching(load, searched)


def watching(load: Workload, kept: bool) -> Cost:
    whole = load.network.whole
    seen = load.decoding() + Work(
        values=load.batch * (WATCH * whole.reads + WATCHED_COPIES * whole.scores),
        calls=5 * whole.layers,
    )
    values = (
        kept
        * (KEPT_VALUES + 2 * TAILS)
        * load.calls
        * (whole.layers + 4 * len(load.network.adapter.attentions()))
    )
    attention = SLACK * FLOAT * WATCHED_COPIES * load.batch * load.network.largest_scores
    seconds = load.pass_over(load.calls, seen) + values * load.speed.search
    return Cost(seconds, load.alive(load.batch) + attention + FLOAT * values)


def daq(stage: DAQ, load: Workload) -> Cost:
    once = watching(load, True)
    return (
        once
        if stage.by == "law"
        else replace(once, seconds=once.seconds + watching(load, False).seconds)
    )


def tcr(stage: TCR, load: Workload) -> Cost:
    each = Work(values=WATCH * load.batch * load.network.whole.reads)
    convolutions = [
        layer for layer in load.network.adapter.layers().values() if isinstance(layer, nn.Conv2d)
    ]
    return Cost(
        load.pass_over(load.kept, each), load.alive(load.batch) + patches(convolutions, ROWS)
    )


def patches(layers: Iterable[nn.Module], rows: int) -> float:
    """Bytes of so many rows of each layer's matrix product."""
    return FLOAT * rows * sum(layer.weight[0].numel() for layer in layers)


def omq(stage: OMQ, load: Workload) -> Cost:
    """A pass, and each weight that may take another width searched at three."""
    seen = load.pass_over(load.kept, Work(values=WATCH * load.batch * load.network.whole.reads))
    form, layers = (
        weight_format(load.settings.weights, load.settings.group),
        load.network.adapter.layers().values(),
    )
    mixing = [layer for layer in layers if stage.mix and mixes(form, len(layer.weight))]
    searched = 3 * sum(layer.weight.numel() for layer in mixing)
    return Cost(
        seen + searched * load.speed.search, load.alive(load.batch) + patches(mixing, PATCHES)
    )


def maintain(stage: Maintain, load: Workload) -> Cost:
    """The features run a few times, and each is searched for its grid."""
    units = [unit for unit in load.network.temporal if unit.reads == ("timestep",)]
    layers = load.network.adapter.all_layers
    values = sum(load.steps * layers[name].out_features for unit in units for name in unit.features)
    passes = sum(4 * load.forward(load.network.temporal_part(unit), load.steps) for unit in units)
    return Cost(passes + values * load.speed.search, 4 * FLOAT * values)


def par(stage: PAR, load: Workload) -> Cost:
    """Each round samples with the quantized model and reconstructs."""
    rounds = [reconstruct(Reconstruct(round=k), load) for k in range(1, stage.rounds + 1)]
    each = load.decoding() + rounding_inputs(load.network.whole, load.batch)
    sampling = stage.rounds * load.pass_over(load.calls, each)
    return Cost(
        sampling + sum(one.seconds for one in rounds), max((one.bytes for one in rounds), default=0)
    )


def distill(stage: Distill, load: Workload) -> Cost:
    """Float answers to every call, then the whole network there and back, its low-rank changes merged each time."""
    whole, samples = load.network.whole, min(load.settings.batch, load.calls * load.batch)
    merged = Work(
        product=stage.rank * whole.weights,
        values=ROUND * whole.weights,
        calls=MERGED_CALLS * whole.layers,
    )
    work = whole.forward.of(samples) + rounding_inputs(whole, samples) + merged
    each = load.speed.forward(work) + load.speed.backward(work)
    kept = whole.kept + whole.reads + ATTENTION_COPIES * whole.scores
    most = SLACK * (BACKWARD_COPIES * FLOAT * samples * kept + STUDENT_BYTES * whole.weights)
    answers = load.pass_over(load.calls) + 2 * JUDGES * load.speed.forward(work)
    return Cost(
        answers + load.settings.iters * each, most + load.calls * load.batch * load.inputs[0]
    )


def compare(stage: CNC | Bias | VSC, load: Workload, calls: int | None = None) -> Cost:
    """Every call in float, and again quantized."""
    whole, calls = load.network.whole, calls or load.calls
    rounded = load.decoding() + rounding_inputs(whole, load.batch)
    attention = SLACK * FLOAT * ATTENTION_COPIES * load.batch * load.network.largest_scores
    return Cost(
        load.pass_over(calls) + load.pass_over(calls, rounded), load.alive(load.batch) + attention
    )


def step_aware(stage: StepAware, load: Workload) -> Cost:
    """One call of each step, watched once and compared at each candidate's bits and at its own."""
    fewer = [bits for bits in stage.candidates if bits < load.settings.inputs]
    if load.settings.inputs > 8:
        return Cost()
    each, seen = compare(stage, load, load.steps), watching(load, True)
    return Cost(
        (len(fewer) + 1) * each.seconds + seen.seconds * load.steps / load.calls,
        max(each.bytes, seen.bytes),
    )


def pack(stage: Pack, load: Workload) -> Cost:
    """Each code bit by bit."""
    bits = min(load.settings.weights, 8)
    return Cost(
        ROUND * bits * load.network.whole.weights * load.speed.value,
        (bits + 2) * load.network.whole.largest,
    )


def nothing(stage: Stage, load: Workload) -> Cost:
    return Cost()


COSTS: dict[type, Callable[[Any, Workload], Cost]] = {
    Collect: collect,
    Assign: nothing,
    FitWeights: fit_weights,
    TIAR: tiar,
    Reconstruct: reconstruct,
    LearnRanges: learn_ranges,
    FitRanges: fit_ranges,
    FSC: nothing,
    TCR: tcr,
    DAQ: daq,
    PAR: par,
    Maintain: maintain,
    OMQ: omq,
    TRD: nothing,
    NDTC: nothing,
    Split: nothing,
    StepAware: step_aware,
    CNC: compare,
    Bias: compare,
    VSC: compare,
    Distill: distill,
    Pack: pack,
}
