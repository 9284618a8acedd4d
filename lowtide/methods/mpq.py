"""MPQ-DM: mixed precision for extremely low bits (Feng et al., AAAI 2025, arXiv 2412.11549).

At two or three bits, a few outlier channels of a weight waste the levels of all. MPQ moves what outliers it can into the
inputs, gives one bit more to the output channels whose weights still have heavy tails and takes one from as many with light
ones, so that the average stays exactly N. Then it distils, and beside the answer it holds the student to the relations
between positions of a feature, averaged over consecutive steps: a coarse student can keep those where it cannot keep values.

    Y = (X diag(delta)) (diag(delta)^-1 W'),  delta_i = sqrt(max|W_i| / max|X_i|)       divisors, 1 / delta
    kappa of a channel's smoothed weight                                              kurtosis
    c_i in {N-1, N, N+1}, min over groups of c_out / 10 of || X W' - Q(X)Q(W'|c) ||^2   class OMQ (search "full")
    R = softmax(f' f / T) of features smoothed over N = 2 steps, KL(R_FP || R_Q)       class TRD, announced to Distill
    QALoRA distillation and one input scale per step                                  stages.distill, which EfficientDM shares

A channel's error depends on its own bits alone, so the full search costs three roundings of a layer, not one per candidate.
MPQ-DM+, which lets the average grow, is OMQ(plus=True): a tenth of the channels goes up and none goes down.

Departs from the paper: statistics come from the float model's inputs; the last layer's input is the feature; both steps of a
pair are one batch, so that no gradient is lost; LoRA changes the smoothed weight. The relation loss weighs 10, not the code's
100, which was chosen where it taught nothing: there its gradient is twice the task's, and answers got worse for it.
Departs from the released code: its relation loss carries no gradient (both features are detached) and so does nothing; its
search tries two candidates with unrounded inputs (search "fast" tries the two); one bit there is {0, d}, here {-d, d}; every
other zero point is an integer, and no channel holds a placeholder. Bits per channel are a vector, not three masked quantizers.
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.costs import Cost, Work, Workload
from lowtide.costs.workload import WATCH, patch_bytes
from lowtide.errors import BadInput
from lowtide.formats import Affine, Format, Mixed
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.swap import quant_layers
from lowtide.settings import Settings
from lowtide.stages.assign import Assign, weight_format
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import Watched, lost, watched
from lowtide.stages.model_edits import smooth_layer
from lowtide.stages.pack import Pack
from lowtide.validation import NotNegative, Positive

ALPHA, SHARE, MOST_GROUPS, PATCHES = 0.5, 10, 5, 512
SEARCHED = {"full": MOST_GROUPS, "fast": 1}


@dataclass(frozen=True)
class OMQ(Stage):
    """Outlier-driven mixed quantization: smooth each inner layer, then deal its bits out by kurtosis.

    Without `smooth` or `mix` only the other of the two is done.
    """

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
        told = job.report["mpq"] = {"groups": {}}
        inner = {
            name: layer
            for name, layer in quant_layers(job.model)
            if layer.format and name not in job.adapter.ends()
        }
        inner = {
            name: layer
            for name, layer in inner.items()
            if not isinstance(layer, nn.Conv2d) or layer.groups == 1
        }
        mixing = {
            name
            for name, layer in inner.items()
            if self.mix and mixes(layer.format, len(layer.weight))
        }
        for name, seen in job.track(
            watched(job, inner, PATCHES, mixing).items(), "bits per channel"
        ):
            if self.smooth:
                smooth_layer(job, name, divisors(inner[name], seen))
            if name in mixing:
                told["groups"][name] = self.deal(job, name, seen)
        if inner:
            told["average_bits"] = average_bits(inner.values())

    def deal(self, job: Job, name: str, seen: Watched) -> int:
        """Fix the bits of one layer's channels; into how many groups of a tenth they moved up. With none, all is as it was."""
        layer = job.model.get_submodule(name)
        weight, bits = layer.whole_weight().flatten(1).float(), layer.format.bits
        order = kurtosis(weight).argsort(descending=True)
        size = len(order) // SHARE
        groups = 1 if self.plus else best_groups(errors(layer, seen), order, SEARCHED[self.search])
        if not groups:
            return 0
        dealt = torch.full((len(order),), bits)
        dealt[order[: groups * size].cpu()] += 1
        if not self.plus:
            dealt[order[len(order) - groups * size :].cpu()] -= 1
        layer.format = Mixed(tuple(dealt.tolist()), signed=False)
        job.plan.layers[name] = replace(job.plan.layers[name], weight=layer.format)
        return groups

    def cost(self, load: Workload) -> Cost:
        """One pass, and each weight that may take another width is searched at three."""
        watched = Work(values=WATCH * load.batch * load.network.whole.reads)
        form = weight_format(load.settings.weights, load.settings.group)
        layers = load.network.adapter.layers().values()
        mixing = [layer for layer in layers if self.mix and mixes(form, len(layer.weight))]
        searched = 3 * sum(layer.weight.numel() for layer in mixing)
        seconds = load.passes(load.kept_calls, watched) + searched * load.speed.search
        return Cost(seconds, load.alive_bytes(load.batch) + patch_bytes(mixing, PATCHES))

    def foresee(self, job: Job) -> None:
        """No channel's bits move, which is how most layers end; MPQ-DM+ moves a tenth in each."""
        for name, layer in quant_layers(job.model):
            plain = not isinstance(layer, nn.Conv2d) or layer.groups == 1
            if not (layer.format and plain) or name in job.adapter.ends():
                continue
            job.plan.layers[name] = replace(job.plan.layers[name], smooth=self.smooth)
            if self.mix and self.plus and mixes(layer.format, len(layer.weight)):
                raised = _raised_bits(name, layer)
                job.plan.layers[name] = replace(job.plan.layers[name], weight=raised)


def mixes(form: Format | None, rows: int) -> bool:
    """Whether a layer can spare a bit and take one: integers of 1 to 8 bits, one grid a channel, ten channels at least."""
    return isinstance(form, Affine) and form.group is None and 2 <= form.bits <= 7 and rows >= SHARE


def _raised_bits(name: str, layer: QuantizedLayer) -> Mixed:
    """A tenth of the channels one bit up. Which tenth it is differs by layer, as in a real plan."""
    rows = len(layer.weight)
    bits = layer.format.bits
    widths = [bits + 1] * (rows // SHARE) + [bits] * (rows - rows // SHARE)
    random.Random(name).shuffle(widths)
    return Mixed(tuple(widths), signed=False)


def average_bits(layers: object) -> float:
    """Bits per weight over these layers."""
    sizes = [(layer.weight[0].numel(), layer.format.bits, len(layer.weight)) for layer in layers]
    bits = sum(
        columns * (sum(bits) if isinstance(bits, tuple) else bits * rows)
        for columns, bits, rows in sizes
    )
    return bits / sum(columns * rows for columns, _, rows in sizes)


def divisors(layer: QuantizedLayer, seen: Watched) -> Tensor:
    """sqrt(max|X_i| / max|W_i|) for each input channel i; 1 where one of both is dead."""
    x = torch.maximum(seen.hi.amax(0), -seen.lo.amin(0)) / layer.divisors
    weight = layer.whole_weight().float().abs().movedim(1, 0).flatten(1).amax(1)
    alive = (x > 1e-6 * x.max()) & (weight > 1e-6 * weight.max())
    return torch.where(alive, x**ALPHA / weight.clamp(min=1e-12) ** (1 - ALPHA), torch.ones_like(x))


def kurtosis(rows: Tensor) -> Tensor:
    """mean((w - mu)^4) / std^4 of each row: 3 for a Gaussian, 1.8 where weights fill their range evenly."""
    centred = rows - rows.mean(1, keepdim=True)
    return centred.pow(4).mean(1) / rows.var(1).square().clamp(min=1e-30)


def errors(layer: QuantizedLayer, seen: Watched) -> Tensor:
    """|| X W' - Q(X)Q(W'|c) ||^2 of each output channel at one bit less, the same, one more: channels x 3."""
    bits = (layer.format.bits - 1, layer.format.bits, layer.format.bits + 1)
    return torch.stack(list(lost(layer, seen, [weight_format(each, None) for each in bits])), 1)


def best_groups(lost: Tensor, order: Tensor, most: int) -> int:
    """How many groups of a tenth go up, and as many down, where the layer's whole error is least."""
    size, lost = len(order) // SHARE, lost[order]

    def total(groups: int) -> float:
        up, down = groups * size, len(lost) - groups * size
        return float(lost[:up, 2].sum() + lost[up:down, 1].sum() + lost[down:, 0].sum())

    return min(range(most + 1), key=total)


@dataclass(frozen=True)
class TRD(Stage):
    """Time-smoothed relation distillation: announce the relation loss to the distillation that follows."""

    weight: NotNegative = 10.0
    temperature: Positive = 1.0

    def check(self, settings: Settings) -> None:
        if settings.steps < 2:
            raise BadInput(
                "found one step",
                "at least two, whose features TRD takes together",
                "give more --steps, or --without trd",
            )

    def run(self, job: Job) -> None:
        job.terms.append(self.loss)

    def loss(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """KL(float || quantized) of the relations, summed over positions, averaged over samples."""
        log_q, log_p = (self.relations(feature) for feature in (ours, theirs))
        return self.weight * (log_p.exp() * (log_p - log_q)).sum((1, 2)).mean()

    def relations(self, features: Tensor) -> Tensor:
        """log softmax(f' f / T): positions x positions, of the mean over both steps with channels of length one."""
        smoothed = F.normalize(features.float().mean(0), dim=1)
        return (smoothed.transpose(1, 2) @ smoothed / self.temperature).log_softmax(-1)

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Assign(per_step=True), OMQ())
    return (*start, FitWeights("mse"), FitRanges("mse"), TRD(), Distill(), Pack())
