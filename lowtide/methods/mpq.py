"""MPQ-DM: mixed precision for extremely low bits (Feng et al., AAAI 2025, arXiv 2412.11549).

At two or three bits, a few outlier channels of a weight waste the levels of all channels. MPQ
moves what outliers it can into the inputs, gives one bit more to the output channels whose weights
still have heavy tails, and takes one bit from as many with light tails, so that the average stays
exactly N. Then it distils, and the loss compares not only the outputs but also the relations
between the positions of a feature, averaged over consecutive steps: a coarse student can keep the
relations where it cannot keep the values.

    Y = (X diag(delta)) (diag(delta)^-1 W'),                        divisors, 1 / delta
        delta_i = sqrt(max|W_i| / max|X_i|)
    kappa of a channel's smoothed weight                            kurtosis
    c_i in {N-1, N, N+1}, min over groups of c_out / 10             class OMQ (search "full")
        of || X W' - Q(X)Q(W'|c) ||^2
    R = softmax(f' f / T) of features smoothed over N steps,        class TRD, which adds its loss
        KL(R_FP || R_Q)                                             to that of Distill
    QALoRA distillation and one input scale per step                stages.distill.Distill

The error of a channel depends on its own bits alone, so the full search costs three roundings of a
layer, not one for each candidate. MPQ-DM+ lets the average grow. Its rule stands in no text that we
could read: OMQ(plus=True), where a tenth of the channels gets one bit more and none gets less, is a
guess.

Departs from the paper: statistics come from the inputs of the float model. The feature is the
input of the last layer. N is 2, as in the released code. All N steps are in one batch, so that no
gradient is lost. LoRA changes the smoothed weight. The relation loss weighs 10. The code's 100 was
chosen where the loss has no effect (see below); at 100 its gradient is twice that of the task, and
the outputs got worse.

Departs from the released code: its relation loss carries no gradient (both features are detached),
so it teaches nothing. Its search tries two candidates with unrounded inputs; search "fast" tries
the same two. One bit there is {0, d}, here {-d, d}; every other zero point is an integer, and no
channel holds a placeholder. Bits per channel are a vector, not three masked quantizers.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from lowtide.costs import Cost, Work, Workload
from lowtide.costs.workload import MINMAX_PASSES, patch_bytes
from lowtide.errors import BadInput
from lowtide.formats import Affine, Format, Mixed
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import QuantLayer, quant_layers
from lowtide.settings import Settings
from lowtide.stages.assign import Assign, weight_format
from lowtide.stages.base import Job, Recipe, Stage, Term
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import LayerInputs, layer_by_layer, layer_inputs, output_errors
from lowtide.stages.model_edits import smooth_layer
from lowtide.stages.pack import Pack
from lowtide.stages.relation_loss import relation_cost, relation_loss
from lowtide.validation import NotNegative, Positive, Within

# The exponent of max|X| in the divisors; that of max|W| is 1 - ALPHA.
ALPHA = 0.5
# A group is one channel in so many, and at most so many groups go up.
SHARE = 10
MOST_GROUPS = 5
# Rows of a layer's matrix product on which candidates are compared.
PATCHES = 512
SEARCHED = {"full": MOST_GROUPS, "fast": 1}


@dataclass(frozen=True)
class OMQ(Stage):
    """Outlier-driven mixed quantization: smooth each inner layer, then assign bits by kurtosis.

    Without `smooth` or without `mix`, only the other of the two is done.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"calibration_steps"})

    search: str = "full"
    plus: bool = False
    smooth: bool = True
    mix: bool = True

    def __post_init__(self) -> None:
        if self.search not in SEARCHED:
            raise BadInput(f"found search {self.search!r}", " or ".join(SEARCHED), "choose one")
        if self.plus and not self.mix:
            raise BadInput(
                "found plus without mix",
                "bits that differ between channels, which plus gives more",
                "leave one out",
            )
        if not (self.smooth or self.mix):
            raise BadInput(
                "found OMQ with neither smooth nor mix",
                "one of the two",
                "use --without omq to have none of it",
            )

    def run(self, job: Job) -> None:
        layers = _inner_layers(job)
        mixed = {
            name
            for name, layer in layers.items()
            if self.mix and _mixes(layer.format, layer.weight)
        }
        groups: dict[str, int] = {}
        statistics = layer_inputs(job, layers, PATCHES, mixed)
        for name, inputs in layer_by_layer(job, statistics, "bits per channel"):
            if self.smooth:
                smooth_layer(job, name, divisors(layers[name], inputs))
            if name in mixed:
                groups[name] = self.assign_bits(job, name, inputs)
        summary: dict[str, object] = {"groups": groups}
        if layers:
            summary["average_bits"] = average_bits(layers.values())
        job.report["mpq"] = summary

    def assign_bits(self, job: Job, name: str, inputs: LayerInputs) -> int:
        """Fix the bits of a layer's channels; how many groups go up, 0 if nothing changes."""
        layer = job.model.get_submodule(name)
        assert isinstance(layer, QuantizedLayer) and isinstance(layer.format, Affine)
        order = kurtosis(layer.smoothed_weight().flatten(1).float()).argsort(descending=True)
        size = len(order) // SHARE
        groups = 1
        if not self.plus:
            groups = best_groups(errors(layer, inputs), order, SEARCHED[self.search])
        if not groups:
            return 0
        bits = torch.full((len(order),), layer.format.bits)
        bits[order[: groups * size].cpu()] += 1
        if not self.plus:
            bits[order[len(order) - groups * size :].cpu()] -= 1
        layer.format = Mixed(tuple(bits.tolist()), signed=False)
        job.plan.layers[name] = replace(job.plan.layers[name], weight=layer.format)
        return groups

    def cost(self, load: Workload) -> Cost:
        """One pass, and three searches for each weight that may take other bits."""
        observed = Work(values=MINMAX_PASSES * load.batch * load.network.whole.reads)
        form = weight_format(load.settings.weights, load.settings.group)
        layers = load.network.adapter.layers().values()
        mixed = [layer for layer in layers if self.mix and _mixes(form, _weight(layer))]
        searched = 3 * sum(_weight(layer).numel() for layer in mixed)
        seconds = load.passes(load.kept_calls, observed) + searched * load.speed.search
        return Cost(seconds, load.alive_bytes(load.batch) + patch_bytes(mixed, PATCHES))

    def summary(self, job: Job) -> str:
        return f"channels of {len(_inner_layers(job))} layers smoothed, and their bits assigned"

    def predict_plan(self, job: Job) -> None:
        """The usual result: no channel changes its bits. MPQ-DM+ raises a tenth of them."""
        for name, layer in _inner_layers(job).items():
            plan = replace(job.plan.layers[name], smooth=self.smooth)
            if self.plus and _mixes(layer.format, layer.weight):
                plan = replace(plan, weight=_raised_bits(name, layer))
            job.plan.layers[name] = plan


@dataclass(frozen=True)
class TRD(Stage):
    """Time-smoothed relation distillation: add the relation loss to the later distillation.

    window: N, the consecutive steps whose features are averaged.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"iters", "batch"})

    weight: NotNegative = 10.0
    temperature: Positive = 1.0
    window: Annotated[int, Within(1)] = 2

    def check(self, settings: Settings) -> None:
        if settings.steps < self.window:
            found = "one step" if settings.steps == 1 else f"{settings.steps} steps"
            raise BadInput(
                f"found {found}",
                f"at least {self.window}, whose features TRD takes together",
                "give more --steps, or --without trd",
            )

    def run(self, job: Job) -> None:
        job.terms.append(Term(self.loss, self.window))

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """KL(float || quantized) of the relations: summed over positions, averaged over samples.

        Both features are (N steps, samples, channels, positions).
        """
        return self.weight * relation_loss(ours, theirs, self.temperature)

    def cost(self, load: Workload) -> Cost:
        """Its share of Distill: one float pass in each iteration, and the tables of relations.

        The bytes are those of Distill with the tables beside them.
        """
        tables = relation_cost(load, self.window)
        return Cost(tables.seconds, Distill().cost(load).bytes + tables.bytes)


def divisors(layer: QuantizedLayer, inputs: LayerInputs) -> Tensor:
    """sqrt(max|X_i| / max|W_i|) for each input channel i; 1 where one of the two is dead."""
    x = torch.maximum(inputs.hi.amax(0), -inputs.lo.amin(0)) / layer.divisors
    weight = layer.smoothed_weight().float().abs().movedim(1, 0).flatten(1).amax(1)
    alive = (x > 1e-6 * x.max()) & (weight > 1e-6 * weight.max())
    return torch.where(alive, x**ALPHA / weight.clamp(min=1e-12) ** (1 - ALPHA), torch.ones_like(x))


def kurtosis(rows: Tensor) -> Tensor:
    """mean((w - mu)^4) / std^4 of each row: 3 for a Gaussian, 1.8 for a uniform distribution."""
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / rows.var(1).square().clamp(min=1e-30)


def errors(layer: QuantizedLayer, inputs: LayerInputs) -> Tensor:
    """|| X W' - Q(X)Q(W'|c) ||^2 by output channel, at N - 1, N and N + 1 bits: (channels, 3)."""
    assert isinstance(layer.format, Affine)
    n = layer.format.bits
    forms = [form for bits in (n - 1, n, n + 1) if (form := weight_format(bits, None))]
    return torch.stack(list(output_errors(layer, inputs, forms)), 1)


def best_groups(errors: Tensor, order: Tensor, most: int) -> int:
    """How many groups of a tenth go up, and as many down, for the layer's least total error."""
    size = len(order) // SHARE
    sorted_errors = errors[order]

    def total(groups: int) -> float:
        up = groups * size
        down = len(order) - groups * size
        raised = sorted_errors[:up, 2].sum()
        unchanged = sorted_errors[up:down, 1].sum()
        lowered = sorted_errors[down:, 0].sum()
        return float(raised + unchanged + lowered)

    return min(range(most + 1), key=total)


def average_bits(layers: Iterable[QuantizedLayer]) -> float:
    """Bits per weight over these layers."""
    total = 0
    weights = 0
    for layer in layers:
        assert layer.format is not None
        rows = len(layer.weight)
        bits = layer.format.bits
        total += layer.weight[0].numel() * (sum(bits) if isinstance(bits, tuple) else bits * rows)
        weights += layer.weight.numel()
    return total / weights


def _inner_layers(job: Job) -> dict[str, QuantLayer]:
    """Layers with a quantized weight, except the first, the last, and grouped convolutions."""
    ends = job.adapter.ends()
    return {
        name: layer
        for name, layer in quant_layers(job.model)
        if layer.format is not None and name not in ends and not _grouped(layer)
    }


def _grouped(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups != 1


def _mixes(form: Format | None, weight: Tensor) -> bool:
    """Whether channels can trade bits: 2 to 7 bits, a scale per channel, at least ten of them."""
    return (
        isinstance(form, Affine)
        and form.group is None
        and 2 <= form.bits <= 7
        and len(weight) >= SHARE
    )


def _weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    return layer.weight


def _raised_bits(name: str, layer: QuantizedLayer) -> Mixed:
    """A tenth of the channels at one bit more; as in a real plan, another tenth in each layer."""
    assert isinstance(layer.format, Affine)
    bits = layer.format.bits
    rows = len(layer.weight)
    widths = [bits + 1] * (rows // SHARE) + [bits] * (rows - rows // SHARE)
    random.Random(name).shuffle(widths)
    return Mixed(tuple(widths), signed=False)


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Assign(per_step=True), OMQ())
    return (*start, FitWeights("mse"), FitRanges("mse"), TRD(), Distill(), Pack())
