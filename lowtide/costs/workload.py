"""Workload: how much a recipe has to do on a network. A stage computes its own cost from it.

A cost is seconds on this machine, and the most bytes that a stage holds beside the weights and
the recorded calls. The constants say how many passes over weights or inputs an operation takes.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from lowtide.costs.speed import Speed
from lowtide.costs.work import FLOAT, Network, Part, Work, layer_weight
from lowtide.models.named_inputs import flat_inputs
from lowtide.settings import Settings

DECODE = 3  # passes over a weight to decode it
ROUND = 8  # passes over an input to round it
MINMAX_PASSES = 2  # passes over an input to record its minimum and maximum
ROUNDING_CALLS = 5  # calls that a layer adds to an iteration while its rounding is learnt
ROUNDING_BYTES = 40  # bytes of one weight while its rounding is learnt; measured 30 to 41
# Copies of a softmax where attention is computed in plain operations: to round its parts, or to
# record their ranges.
ATTENTION_COPIES = 3
STATISTICS_COPIES = 2
# Copies of a unit's values: those kept for the backward pass, and the gradients alive at a time.
BACKWARD_COPIES = 1.25
SLACK = 1.25  # bytes that the allocator holds, as a multiple of the bytes requested


@dataclass(frozen=True)
class Cost:
    """Seconds of a stage, and the most bytes it holds."""

    seconds: float = 0
    bytes: float = 0


@dataclass(frozen=True)
class Workload:
    """The network's work, the settings, this machine's speed, and the size of the calibration set.

    steps: calls of the denoiser for one image.
    branches: samples of a call that belong to one image; two with classifier-free guidance.
    width: bytes of a value that the denoiser computes.
    apart: recorded calls and tapes are elsewhere than the values: on the CPU, beside a card.
    """

    network: Network
    settings: Settings
    speed: Speed
    steps: int
    branches: int
    width: int = FLOAT
    apart: bool = False

    @property
    def batch(self) -> int:
        """Samples of one call of the denoiser."""
        return self.settings.calibration_batch * self.branches

    @property
    def batches(self) -> int:
        """Batches of calibration images."""
        return self.settings.images * self.branches // self.batch

    @property
    def calls(self) -> int:
        """Calls of the denoiser that calibration records."""
        return self.steps * self.batches

    @property
    def kept_calls(self) -> int:
        """Recorded calls whose inputs serve reconstruction."""
        return min(self.settings.calibration_steps, self.steps) * self.batches

    @property
    def samples(self) -> int:
        """Samples of one learning iteration."""
        return min(self.settings.batch, self.kept_calls * self.batch)

    @cached_property
    def input_bytes(self) -> tuple[float, float]:
        """Bytes of one sample's inputs: of the input that changes with the step, and of all."""
        adapter = self.network.adapter
        inputs = flat_inputs(adapter.architecture.example(adapter.meta, 2))
        sizes: dict[str, float] = {}
        for name, value in inputs.items():
            samples = 2 if adapter.architecture.rows(name, value, 2) else 1
            sizes[name] = value.numel() * FLOAT / samples
        return sizes[adapter.parameters[0]], sum(sizes.values())

    def forward(self, part: Part, samples: float) -> float:
        """Seconds of a forward pass of one part."""
        return self.speed.forward(part.forward.of(samples))

    def alive_bytes(self, samples: float) -> float:
        """The most bytes of values alive in a forward pass of the network."""
        return SLACK * self.width * samples * self.network.alive

    def passes(self, calls: int, extra: Work | None = None) -> float:
        """Seconds of `calls` calls of the whole network, with extra work in each."""
        work = self.network.whole.forward.of(self.batch) + (extra or Work())
        return calls * self.speed.forward(work)

    def decoding(self) -> Work:
        """What quantized weights add to a call."""
        whole = self.network.whole
        return Work(values=DECODE * whole.weights, calls=DECODE * whole.layers)

    def recorded_bytes(self) -> float:
        """Bytes of the recorded calls, which are kept until the end."""
        changing, whole = self.input_bytes
        return self.batch * (self.calls * changing + self.batches * (whole - changing))

    def streams(self, rounded: Work | None = None) -> float:
        """Seconds of the float and the quantized stream over the kept calls."""
        quantized = self.decoding() + (rounded or Work())
        return self.passes(self.kept_calls) + self.passes(self.kept_calls, quantized)

    def tape_bytes(self) -> float:
        """Bytes of both streams beside the values; the rest is elsewhere, at last on disk."""
        if self.apart:
            return 0
        streamed = 2 * FLOAT * self.kept_calls * self.batch * self.network.streamed
        return min(self.settings.memory, streamed)

    def comparison(self, calls: int) -> Cost:
        """`calls` calls in float, and the same calls quantized."""
        rounded = self.decoding() + rounding_inputs(self.network.whole, self.batch)
        attention = SLACK * FLOAT * ATTENTION_COPIES * self.batch * self.network.largest_scores
        seconds = self.passes(calls) + self.passes(calls, rounded)
        return Cost(seconds, self.alive_bytes(self.batch) + attention)


def rounding_work(part: Part, samples: float) -> Work:
    """One iteration of learning a unit's rounding."""
    extra = Work(weights=part.weights, calls=ROUNDING_CALLS * part.layers)
    return part.forward.of(samples) + extra


def rounding_bytes(part: Part, samples: float, width: int = FLOAT) -> float:
    """Bytes held while a unit's rounding is learnt; `width`: of a value that it computes."""
    values = BACKWARD_COPIES * samples * part.kept
    return SLACK * (width * values + ROUNDING_BYTES * part.weights)


def rounding_inputs(part: Part, samples: float) -> Work:
    """The extra work where every input is rounded and attention runs in plain operations."""
    values = samples * (ROUND * part.reads + 2 * ROUND * part.scores)
    return Work(values=values, calls=ROUND * part.layers)


def patch_bytes(layers: Iterable[nn.Module], rows: int) -> float:
    """Bytes of `rows` input rows of each layer's matrix product."""
    return FLOAT * rows * sum(layer_weight(layer)[0].numel() for layer in layers)
