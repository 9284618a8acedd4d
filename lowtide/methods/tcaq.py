"""TCAQ-DM: timestep-channel adaptive quantization (Huang et al., AAAI 2025, arXiv 2412.16700).

The inputs of a denoiser's convolutions swing with the timestep and with the channel, its softmax outputs change the shape of
their distribution along the way, and a quantized model samples along a path it was never calibrated on. TCAQ moves the
swing from inputs into weights, picks for each softmax and step the quantizer its tail asks for, and reconstructs in rounds
on the quantized model's own path.

    TCR   m_{t,c} = max |X^t_c|,  r_{t,c} = m_{t,c} / min_c m_{t,c}                              class TCR
          r_c = sum_t m_{t,c} r_{t,c} / sum_t m_{t,c}, cut at R;  X / r and W r
    DAQ   R_g = L(power law) - L(alternative);  R_g > 0: log2, else uniform                     class DAQ
    PAR   for k = 1..K: sample with the quantized model, reconstruct on its x_t                 class PAR
    the base it stands on: temporal features rounded for themselves, one input range per step   stages.temporal, stages.ranges

Departs from the paper, whose text and code are not public (the equations come from independent notes that agree): timestep
groups thin the statistics only, because one weight can hold one r. The minimum over channels is a low quantile, since a dead
channel would blow up every other. R, which the paper sets by hand, is the one that leaves a layer the least error, or 1: a
calmer input makes a wider weight, and at few weight bits that costs more than it gains. r folds into a norm in front of the
convolution where that is exact (no SiLU in between) and is a table of the layer elsewhere. The likelihood ratio is taken
against the exponential on the upper half of the values; `against` adds the log-normal. K is 2, iterations halve each round,
and rounding starts warm, from the decisions of the round before. Only roundings are learnt on the quantized path, not ranges.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.costs import Cost, Work, Workload
from lowtide.costs.workload import WATCH, patch_bytes, rounding_inputs
from lowtide.errors import BadInput
from lowtide.formats import SEARCHES, Adaptive, Grid
from lowtide.nn.clock import Clock
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantConv2d
from lowtide.nn.swap import find_clock, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect, sampled_calls
from lowtide.stages.fit_ranges import FitRanges, Seen, hear, watch, watching_cost
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import Watched, lost, watched
from lowtide.stages.model_edits import fold_into_norm, smooth_layer
from lowtide.stages.pack import Pack
from lowtide.stages.power_law import ALTERNATIVES, power_law_wins
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.tiar import TIAR
from lowtide.validation import Count, Positive, Share

CUTS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ROWS = 512


@dataclass(frozen=True)
class TCR(Stage):
    """Timestep-channel reparameterization of every convolution's input; `most` is R, and None lets each layer choose it."""

    most: Positive | None = None
    lowest: Share = 0.05
    groups: Count | None = None

    def run(self, job: Job) -> None:
        layers = {name: layer for name, layer in quant_layers(job.model) if self.suits(layer)}
        told = job.report["tcr"] = {"layers": len(layers), "folded": [], "cuts": {}}
        for name, seen in job.track(watched(job, layers, ROWS).items(), "reparameterization"):
            r = reparameterization(
                grouped(seen.peaks() / layers[name].divisors, self.groups), self.lowest
            )
            cut = told["cuts"][name] = self.most or best_cut(layers[name], seen, r)
            if cut == 1:
                continue
            if fold_into_norm(job, name, r.clamp(1.0, cut)):
                told["folded"].append(name)
            else:
                smooth_layer(job, name, r.clamp(1.0, cut))

    def suits(self, layer: nn.Module) -> bool:
        quantized = (
            isinstance(layer, QuantConv2d)
            and layer.format is not None
            and layer.input.format is not None
        )
        return quantized and layer.groups == 1 and layer.in_channels > 1

    def cost(self, load: Workload) -> Cost:
        """One pass that watches the inputs of convolutions and keeps patches of them."""
        each = Work(values=WATCH * load.batch * load.network.whole.reads)
        layers = load.network.adapter.layers().values()
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        patches = patch_bytes(convolutions, ROWS)
        return Cost(load.passes(load.kept_calls, each), load.alive_bytes(load.batch) + patches)

    def foresee(self, job: Job) -> None:
        """Every convolution keeps its divisors, unless a norm in front takes them: the most there is."""
        for name, layer in quant_layers(job.model):
            reads = name in job.adapter.reads and job.adapter.norm_before(name) is None
            if self.suits(layer) and reads:
                job.plan.layers[name] = replace(job.plan.layers[name], smooth=True)


def best_cut(layer: QuantConv2d, seen: Watched, r: Tensor) -> float:
    """The R that leaves the layer's own answer nearest to float, both of its sides rounded; 1 leaves the layer as it was."""
    before, divisors = layer.smooth, layer.divisors

    def error(cut: float) -> float:
        layer.set_smooth(divisors * r.clamp(1.0, cut))
        return float(sum(part.sum() for part in lost(layer, seen, [layer.format])))

    found = min(CUTS, key=error)
    layer.set_smooth(before)
    return found


def grouped(peaks: Tensor, groups: int | None) -> Tensor:
    """The peaks of consecutive timesteps as one, so that `groups` remain."""
    return (
        peaks
        if groups is None
        else torch.stack([part.amax(0) for part in peaks.tensor_split(min(groups, len(peaks)))])
    )


def reparameterization(peaks: Tensor, lowest: float) -> Tensor:
    """r_c from m_{t,c}: each step's channel ratios, weighed by the channel's peak at that step."""
    target = (
        peaks.quantile(lowest, dim=1, keepdim=True)
        .clamp(min=1e-3 * peaks.amax(1, keepdim=True))
        .clamp(min=1e-12)
    )
    return (peaks * peaks / target).sum(0) / peaks.sum(0).clamp(min=1e-12)


@dataclass(frozen=True)
class DAQ(Stage):
    """Dynamically adaptive quantizer: log2 where a softmax falls off like a power law at that step, uniform elsewhere.

    `by` "error" takes instead what changes the attention's answer less, log2 or uniform on its best range.
    """

    against: tuple[str, ...] = ("exponential",)
    share: Share = 0.5
    by: str = "law"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in ALTERNATIVES]:
            raise BadInput(
                f"found law {unknown[0]!r}",
                f"some of {', '.join(ALTERNATIVES)}",
                "name those to compare with",
            )
        if self.by not in ("law", "error"):
            raise BadInput(f"found by {self.by!r}", "law or error", "choose one")

    def run(self, job: Job) -> None:
        if not job.plan.attentions:
            job.report["daq"] = {}
            job.console.print(
                "DAQ chose nothing: no attention is quantized (profile full does, with inputs of at most 8 bits)"
            )
            return
        seen = watch(job, keep=True)
        law, parts = (
            self.by == "law",
            {name: f"{name}.processor.softmax" for name in job.plan.attentions},
        )
        rivals = {
            name: Rivals(job, name, seen[part], search=not law) for name, part in parts.items()
        }
        chosen = (
            {name: self.by_law(each) for name, each in rivals.items()}
            if law
            else by_error(job, rivals)
        )
        for name, log2 in chosen.items():
            rivals[name].settle(job, name, log2)
        job.report["daq"] = {name: float(log2.float().mean()) for name, log2 in chosen.items()}
        set_precision(job.model, Precision.FULL)

    def by_law(self, rivals: "Rivals") -> Tensor:
        """R_g > 0, at each step."""
        return torch.tensor(
            [power_law_wins(row.numpy(), self.against, self.share) > 0 for row in rivals.values]
        )

    def cost(self, load: Workload) -> Cost:
        """One pass that watches all inputs, and one more where both quantizers are tried."""
        watched = watching_cost(load, search=True)
        if self.by == "law":
            return watched
        tried = watching_cost(load, search=False)
        return replace(watched, seconds=watched.seconds + tried.seconds)

    def foresee(self, job: Job) -> None:
        """Every softmax may choose at some step."""
        for name, parts in job.plan.attentions.items():
            softmax = replace(parts["softmax"], input=Adaptive(job.settings.inputs))
            job.plan.attentions[name] = parts | {"softmax": softmax}


class Rivals:
    """The two grids that one softmax might have at each step (or one for all): log2 below its peak, uniform up to it.

    With `search`, uniform on its best range.
    """

    def __init__(self, job: Job, name: str, seen: Seen, search: bool):
        self.attention = job.model.get_submodule(name).processor
        self.form, self.each = (
            Adaptive(job.plan.attentions[name]["softmax"].input.bits),
            self.attention.softmax.per_step,
        )
        seen = seen.filled() if self.each else seen.whole()
        self.values, self.peak = [values.cpu() for values in seen.drawn()], seen.hi.cpu()
        ends = (
            torch.cat([self.best_end(*row) for row in seen.rows()]).cpu() if search else self.peak
        )
        self.uniform = self.form.params(torch.zeros_like(ends), ends)
        self.lost = torch.zeros(2, len(ends))

    def best_end(self, values: Tensor, weights: Tensor) -> Tensor:
        """Where a uniform grid from zero should end."""
        return SEARCHES["mse"](values[None], self.form.uniform, weights)[1][0]

    def listen(self, clock: Clock) -> list[RemovableHandle]:
        """Hooks that let both grids answer; attention asks for its softmax, then for v."""
        held: list[Tensor] = []
        return [
            self.attention.softmax.register_forward_pre_hook(lambda _, args: held.append(args[0])),
            self.attention.v.register_forward_pre_hook(
                lambda _, args: self.judge(held.pop(), args[0], int(clock.index))
            ),
        ]

    @torch.no_grad()
    def judge(self, softmax: Tensor, value: Tensor, step: int) -> None:
        """What either grid does to softmax v, which is more than to the softmax: errors of a row can point one way and add up."""
        row = step if self.each else 0
        for kind in (0, 1):
            grid = self.form.choose(
                self.uniform, self.peak, torch.full_like(self.peak, kind, dtype=torch.bool)
            )
            grid = Grid(grid.scale[row].to(softmax.device), grid.zero[row].to(softmax.device))
            rounded = self.form.decode(self.form.encode(softmax, grid), grid)
            self.lost[kind, row] += (
                ((rounded - softmax).to(value.dtype) @ value).float().square().sum().cpu()
            )

    def settle(self, job: Job, name: str, log2: Tensor) -> None:
        form = (
            self.form if log2.any() else self.form.uniform
        )  # uniform at every step, it can still be learnt
        parts = job.plan.attentions[name]
        job.plan.attentions[name] = parts | {"softmax": replace(parts["softmax"], input=form)}
        self.attention.softmax.format = form
        self.attention.softmax.take(self.form.choose(self.uniform, self.peak, log2))


def by_error(job: Job, rivals: dict[str, Rivals]) -> dict[str, Tensor]:
    """Let both grids of every softmax answer in one more pass over all calls."""
    clock = find_clock(job.model)
    hear(
        job, [hook for each in rivals.values() for hook in each.listen(clock)], "softmax quantizers"
    )
    return {name: each.lost[1] < each.lost[0] for name, each in rivals.items()}


@dataclass(frozen=True)
class PAR(Stage):
    """Progressively aligned reconstruction: K rounds on the quantized model's own trajectory, float answers on the same x_t.

    What ranges are fitted to stays the float model's trajectory: on the wider one of a model that drifts they are coarser.
    Its rounds reconstruct by themselves, also without the stage Reconstruct before them.
    """

    rounds: Count = 2

    def run(self, job: Job) -> None:
        float_calls = job.calls
        for k in range(1, self.rounds + 1):
            set_precision(job.model, Precision.FULL)
            job.calls = sampled_calls(job)
            Reconstruct(round=k).run(job)
        job.calls = float_calls

    def cost(self, load: Workload) -> Cost:
        """Each round samples with the quantized model and reconstructs."""
        rounds = [Reconstruct(round=k).cost(load) for k in range(1, self.rounds + 1)]
        each = load.decoding() + rounding_inputs(load.network.whole, load.batch)
        sampling = self.rounds * load.passes(load.calls, each)
        largest = max((cost.bytes for cost in rounds), default=0)
        return Cost(sampling + sum(cost.seconds for cost in rounds), largest)


def recipe(settings: Settings) -> Recipe:
    learnt = (LearnRanges(),) if settings.range_iters else ()
    start = (
        Collect(),
        Assign(per_step=True),
        TCR(),
        FitWeights("mse"),
        TIAR(),
        Reconstruct(),
        FitRanges("minmax"),
        DAQ(),
    )
    return (*start, PAR(), FitRanges("minmax"), DAQ(), *learnt, Pack())
