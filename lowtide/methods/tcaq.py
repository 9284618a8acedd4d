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
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.checks import Count, Positive, Share
from lowtide.errors import BadInput
from lowtide.formats import SEARCHES, Either, Grid
from lowtide.nn.fake import QuantConv2d
from lowtide.nn.swap import look, quant_layers
from lowtide.plan import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe
from lowtide.stages.collect import Collect, sampled_calls
from lowtide.stages.pack import Pack
from lowtide.stages.products import Watched, lost, watched
from lowtide.stages.ranges import FitRanges, Seen, watch
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.rewrite import fold_into_norm, smooth_layer
from lowtide.stages.tails import ALTERNATIVES, power_law_wins
from lowtide.stages.temporal import TIAR
from lowtide.stages.weights import FitWeights

CUTS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ROWS = 512


@dataclass(frozen=True)
class TCR:
    """Timestep-channel reparameterization of every convolution's input; `most` is R, and None lets each layer choose it."""

    most: Positive | None = None
    lowest: Share = 0.05
    groups: Count | None = None

    def run(self, job: Job) -> None:
        layers = {name: layer for name, layer in quant_layers(job.model) if self.suits(layer)}
        told = job.report["tcr"] = {"layers": len(layers), "folded": [], "cuts": {}}
        for name, seen in job.track(watched(job, layers, ROWS).items(), "reparameterization"):
            r = reparameterization(grouped(seen.peaks(), self.groups), self.lowest)
            cut = told["cuts"][name] = self.most or best_cut(layers[name], seen, r)
            if cut == 1:
                continue
            if fold_into_norm(job, name, r.clamp(1.0, cut)):
                told["folded"].append(name)
            else:
                smooth_layer(job, name, r.clamp(1.0, cut))

    def suits(self, layer: nn.Module) -> bool:
        quantized = isinstance(layer, QuantConv2d) and layer.format is not None and layer.input.format is not None
        return quantized and layer.groups == 1 and layer.in_channels > 1


def best_cut(layer: QuantConv2d, seen: Watched, r: Tensor) -> float:
    """The R that leaves the layer's own answer nearest to float, both of its sides rounded; 1 leaves the layer as it was."""

    def error(cut: float) -> float:
        layer.set_smooth(r.clamp(1.0, cut))
        return float(sum(part.sum() for part in lost(layer, seen, [layer.format])))

    found = min(CUTS, key=error)
    layer.set_smooth(r.new_empty(0))
    return found


def grouped(peaks: Tensor, groups: Count | None) -> Tensor:
    """The peaks of consecutive timesteps as one, so that `groups` remain."""
    return peaks if groups is None else torch.stack([part.amax(0) for part in peaks.tensor_split(min(groups, len(peaks)))])


def reparameterization(peaks: Tensor, lowest: float) -> Tensor:
    """r_c from m_{t,c}: each step's channel ratios, weighed by the channel's peak at that step."""
    target = peaks.quantile(lowest, dim=1, keepdim=True).clamp(min=1e-3 * peaks.amax(1, keepdim=True)).clamp(min=1e-12)
    return (peaks * peaks / target).sum(0) / peaks.sum(0).clamp(min=1e-12)


@dataclass(frozen=True)
class DAQ:
    """Dynamically adaptive quantizer: log2 where a softmax falls off like a power law at that step, uniform elsewhere.

    `by` "error" takes what leaves the squared error of the values least instead, log2 or uniform on its best range.
    """

    against: tuple[str, ...] = ("exponential",)
    share: Share = 0.5
    by: str = "law"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in ALTERNATIVES]:
            raise BadInput(f"found law {unknown[0]!r}", f"some of {', '.join(ALTERNATIVES)}", "name those to compare with")
        if self.by not in ("law", "error"):
            raise BadInput(f"found by {self.by!r}", "law or error", "choose one")

    def run(self, job: Job) -> None:
        if not job.plan.attentions:
            job.report["daq"] = {}
            job.console.print("DAQ chose nothing: no attention is quantized (profile full does, with inputs of at most 8 bits)")
            return
        seen = watch(job, keep=True)
        told = {name: self.choose(job, name, seen[f"{name}.processor.softmax"]) for name in job.plan.attentions}
        job.report["daq"] = {name: float(log2.float().mean()) for name, log2 in told.items()}
        look(job.model, True, True)

    def choose(self, job: Job, name: str, seen: Seen) -> Tensor:
        """Fit the softmax quantizer of one attention: a choice for each step, or one for all."""
        parts, quantizer = job.plan.attentions[name], job.model.get_submodule(f"{name}.processor.softmax")
        form = Either(parts["softmax"].input.bits)
        steps = seen.values if quantizer.per_step else [[value for step in seen.values for value in step]]
        values = [torch.cat(step).cpu() for step in steps]
        hi = (seen.hi if quantizer.per_step else seen.hi.max()[None]).cpu()
        log2, uniform = (self.by_law if self.by == "law" else by_error)(form, values, hi)
        job.plan.attentions[name] = parts | {"softmax": replace(parts["softmax"], input=form)}
        quantizer.format = form
        quantizer.take(Grid(torch.where(log2, hi, uniform.scale), log2))
        return log2

    def by_law(self, form: Either, values: list[Tensor], hi: Tensor) -> tuple[Tensor, Grid]:
        """R_g > 0 at each step, and the grid for where it is not."""
        wins = [power_law_wins(row.numpy(), self.against, self.share) > 0 for row in values]
        return torch.tensor(wins), form.params(torch.zeros_like(hi), hi)


def by_error(form: Either, values: list[Tensor], hi: Tensor) -> tuple[Tensor, Grid]:
    """Where log2 up to the greatest value errs less than a uniform grid from zero on its best range; and that grid."""
    ends = torch.cat([SEARCHES["mse"](F.pad(row, (1, 0))[None], form.uniform)[1][0] for row in values])
    uniform, yes = form.params(torch.zeros_like(ends), ends), torch.ones(1, dtype=torch.bool)
    grids = ((Grid(top[None], yes), Grid(scale[None], ~yes)) for top, scale in zip(hi, uniform.scale, strict=True))
    errors = [[distance(row, form, grid) for grid in pair] for row, pair in zip(values, grids, strict=True)]
    return torch.tensor([log2 < even for log2, even in errors]), uniform


def distance(values: Tensor, form: Either, grid: Grid) -> float:
    return (form.decode(form.encode(values, grid), grid) - values).square().sum().item()


@dataclass(frozen=True)
class PAR:
    """Progressively aligned reconstruction: K rounds on the quantized model's own trajectory, float answers on the same x_t.

    What ranges are fitted to stays the float model's trajectory: on the wider one of a model that drifts they are coarser.
    """

    rounds: Count = 2

    def run(self, job: Job) -> None:
        float_calls = job.calls
        for k in range(1, self.rounds + 1):
            look(job.model, True, True)
            job.calls = sampled_calls(job)
            Reconstruct(round=k).run(job)
        job.calls = float_calls


def recipe(settings: Settings) -> Recipe:
    learnt = (LearnRanges(),) if settings.range_iters else ()
    start = (Collect(), Assign(per_step=True), TCR(), FitWeights("mse"), TIAR(), Reconstruct(), FitRanges("minmax"), DAQ())
    return (*start, PAR(), FitRanges("minmax"), DAQ(), *learnt, Pack())
