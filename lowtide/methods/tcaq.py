"""TCAQ-DM: timestep-channel adaptive quantization (Huang et al., AAAI 2025, arXiv 2412.16700).

The inputs of a denoiser's convolutions vary with the timestep and with the channel, its softmax
outputs change the shape of their distribution, and a quantized model samples along a path on which
it was not calibrated. TCAQ moves the variation from inputs into weights, chooses a quantizer for
each softmax and step by the tail of its distribution, and reconstructs in rounds on the quantized
model's own path.

    TCR   m_{t,c} = max |X^t_c|,  r_{t,c} = m_{t,c} / min_c m_{t,c}                  class TCR
          r_c = sum_t m_{t,c} r_{t,c} / sum_t m_{t,c}, cut at R;  X / r and W r
    DAQ   R_g = L(power law) - L(alternative);  R_g > 0: log2, else uniform          class DAQ
    PAR   for k = 1..K: sample with the quantized model, reconstruct on its x_t      class PAR
    base  temporal features rounded for themselves, one input range per step         stages.tiar

Departs from the paper (not public; independent notes agree): timestep groups only thin the
statistics, since one weight has one r. A low quantile over channels stands for the minimum, since a
dead channel would make all other ratios explode. Each layer takes the R of the least error, or 1;
the paper sets R by hand. r folds into a norm if no SiLU lies between, else it is a table. The
likelihood ratio is against the exponential, on the upper half of the values (`against` adds the
log-normal). K is 2. Iterations halve each round, which learns roundings alone, from the last ones.
"""

from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.costs import Cost, Work, Workload
from lowtide.costs.workload import MINMAX_PASSES, patch_bytes, rounding_inputs
from lowtide.errors import BadInput
from lowtide.formats import SEARCHES, Adaptive, Grid
from lowtide.nn.attention import QuantAttention
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantConv2d
from lowtide.nn.swap import find_clock, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages import fit_ranges
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect, sampled_calls
from lowtide.stages.fit_ranges import FitRanges, InputStatistics, statistics_cost
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import LayerInputs, layer_by_layer, layer_inputs, output_errors
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.model_edits import fold_into_norm, smooth_layer
from lowtide.stages.pack import Pack
from lowtide.stages.power_law import ALTERNATIVES, power_law_wins
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR
from lowtide.validation import Count, Positive, Share

# The values of R that a layer chooses from, and the input patches that it compares them on.
CUTS = (1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
ROWS = 512
NO_ATTENTION = "DAQ: no softmax is quantized (profile full does it, for inputs of up to 8 bits)"


@dataclass(frozen=True)
class TCR(Stage):
    """Timestep-channel reparameterization: divide the input channels of every convolution by r.

    `most` is R, or None: each layer chooses. `lowest` is the quantile that stands for the minimum
    over channels. `groups` counts timestep groups, or None: every timestep is one.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"calibration_steps"})
    most: Positive | None = None
    lowest: Share = 0.05
    groups: Count | None = None

    def run(self, job: Job) -> None:
        layers = {name: layer for name, layer in quant_layers(job.model) if self.suits(layer)}
        folded: list[str] = []
        cuts: dict[str, float] = {}
        received = layer_inputs(job, layers, ROWS)
        for name, inputs in layer_by_layer(job, received, "reparameterization"):
            peaks = grouped(inputs.peaks() / layers[name].divisors, self.groups)
            r = reparameterization(peaks, self.lowest)
            cuts[name] = self.most or best_cut(layers[name], inputs, r)
            if cuts[name] == 1:
                continue
            if fold_into_norm(job, name, r.clamp(1.0, cuts[name])):
                folded.append(name)
            else:
                smooth_layer(job, name, r.clamp(1.0, cuts[name]))
        job.report["tcr"] = {"layers": len(layers), "folded": folded, "cuts": cuts}

    def suits(self, layer: nn.Module) -> TypeGuard[QuantConv2d]:
        """Whether this is a quantized convolution over several channels, all in one group."""
        return (
            isinstance(layer, QuantConv2d)
            and layer.format is not None
            and layer.input.format is not None
            and layer.groups == 1
            and layer.in_channels > 1
        )

    def cost(self, load: Workload) -> Cost:
        """One pass that observes the inputs of convolutions and keeps patches of them."""
        each = Work(values=MINMAX_PASSES * load.batch * load.network.whole.reads)
        layers = load.network.adapter.layers().values()
        patches = patch_bytes([layer for layer in layers if isinstance(layer, nn.Conv2d)], ROWS)
        return Cost(load.passes(load.kept_calls, each), load.alive_bytes(load.batch) + patches)

    def predict_plan(self, job: Job) -> None:
        """The most that can happen: every convolution that cannot fold r into a norm keeps it."""
        for name, layer in quant_layers(job.model):
            keeps = name in job.adapter.reads and job.adapter.norm_before(name) is None
            if self.suits(layer) and keeps:
                job.plan.layers[name] = replace(job.plan.layers[name], smooth=True)


@dataclass(frozen=True)
class DAQ(Stage):
    """Dynamically adaptive quantizer: a softmax takes log2 at the steps where its tail asks for it.

    By "law": log2 where the largest `share` of the values falls off like a power law rather than
    like the laws `against`. By "error": the grid that changes the attention's answer less.
    """

    against: tuple[str, ...] = ("exponential",)
    share: Share = 0.5
    by: str = "law"

    def __post_init__(self) -> None:
        if unknown := [name for name in self.against if name not in ALTERNATIVES]:
            laws = ", ".join(ALTERNATIVES)
            raise BadInput(f"found law {unknown[0]!r}", f"some of {laws}", "choose among these")
        if self.by not in ("law", "error"):
            raise BadInput(f"found by {self.by!r}", "law or error", "choose one")

    def run(self, job: Job) -> None:
        names = [name for name, parts in job.plan.attentions.items() if parts["softmax"].input]
        if not names:
            job.report["daq"] = {}
            job.console.print(NO_ATTENTION)
            return
        statistics = fit_ranges.input_statistics(job, keep=True)
        grids: dict[str, _SoftmaxGrids] = {}
        for name in names:
            softmax = statistics[f"{name}.processor.softmax"]
            grids[name] = _SoftmaxGrids(job, name, softmax, search=self.by == "error")
        if self.by == "law":
            choices = {name: self.by_law(each) for name, each in grids.items()}
        else:
            choices = _by_error(job, grids)
        for name, log2 in choices.items():
            grids[name].settle(job, name, log2)
        job.report["daq"] = {name: float(log2.float().mean()) for name, log2 in choices.items()}
        set_precision(job.model, Precision.FULL)

    def by_law(self, grids: "_SoftmaxGrids") -> Tensor:
        """R_g > 0 at each step: (steps,)."""
        ratios = [power_law_wins(row.numpy(), self.against, self.share) for row in grids.values]
        return torch.tensor([ratio > 0 for ratio in ratios])

    def cost(self, load: Workload) -> Cost:
        """One pass that observes all inputs, and by error one more that tries both grids."""
        observed = statistics_cost(load, search=True)
        tried = statistics_cost(load, search=False).seconds if self.by == "error" else 0
        return replace(observed, seconds=observed.seconds + tried)

    def predict_plan(self, job: Job) -> None:
        """Every softmax takes log2 at some step."""
        for name, parts in job.plan.attentions.items():
            if form := parts["softmax"].input:
                softmax = replace(parts["softmax"], input=Adaptive(cast(int, form.bits)))
                job.plan.attentions[name] = parts | {"softmax": softmax}


@dataclass(frozen=True)
class PAR(Stage):
    """Progressively aligned reconstruction: K rounds on the quantized model's own trajectory.

    Each round compares with the float model on the same x_t, and needs no stage Reconstruct before
    it. Ranges are still fitted on the float model's trajectory: that of a model that drifts is
    wider, and ranges fitted on it are coarser.
    """

    reads: ClassVar[frozenset[str]] = Reconstruct.reads
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


def grouped(peaks: Tensor, groups: int | None) -> Tensor:
    """Peaks of groups of consecutive timesteps: (timesteps, channels) -> (groups, channels)."""
    if groups is None:
        return peaks
    return torch.stack([part.amax(0) for part in peaks.tensor_split(min(groups, len(peaks)))])


def reparameterization(peaks: Tensor, lowest: float) -> Tensor:
    """r_c, (channels,), from m_{t,c}, (timesteps, channels): ratios weighed by the peaks."""
    floor = 1e-3 * peaks.amax(1, keepdim=True)
    least = peaks.quantile(lowest, dim=1, keepdim=True).clamp(min=floor).clamp(min=1e-12)
    return (peaks * peaks / least).sum(0) / peaks.sum(0).clamp(min=1e-12)


def best_cut(layer: QuantConv2d, inputs: LayerInputs, r: Tensor) -> float:
    """The R that gives the rounded layer the least output error; 1 changes nothing."""
    smooth = layer.smooth
    divisors = layer.divisors
    assert isinstance(smooth, Tensor)

    def error(cut: float) -> float:
        layer.set_smooth(divisors * r.clamp(1.0, cut))
        return float(next(output_errors(layer, inputs, [layer.format])).sum())  # pyright: ignore[reportArgumentType] or Mixed

    best = min(CUTS, key=error)
    layer.set_smooth(smooth)
    return best


class _SoftmaxGrids:
    """The two grids that one softmax may have, at each step or for all steps at once.

    log2 ends at the largest value. Uniform ends there too, or with `search` where it errs least.
    """

    def __init__(self, job: Job, name: str, statistics: InputStatistics, *, search: bool):
        attention = job.model.get_submodule(name).processor
        assert isinstance(attention, QuantAttention) and attention.softmax.format
        self.attention = attention
        self.form = Adaptive(cast(int, attention.softmax.format.bits))
        self.per_step = attention.softmax.per_step
        values = statistics.filled() if self.per_step else statistics.whole()
        self.values = [row.cpu() for row in values.drawn()]
        self.peak = values.hi.cpu()
        ends = torch.cat([self.end(*row) for row in values.rows()]).cpu() if search else self.peak
        self.uniform = self.form.params(torch.zeros_like(ends), ends)
        self.errors = torch.zeros(2, len(ends))  # of the answer: uniform, log2

    def end(self, values: Tensor, weights: Tensor) -> Tensor:
        """The end of the best uniform grid from zero: (1,)."""
        return SEARCHES["mse"](values[None], self.form.uniform, weights)[1][0]

    def hooks(self, job: Job) -> list[RemovableHandle]:
        """Hooks that compare both grids; attention rounds its softmax first, then v."""
        held: list[Tensor] = []
        return [
            self.attention.softmax.register_forward_pre_hook(lambda _, args: held.append(args[0])),
            self.attention.v.register_forward_pre_hook(
                lambda _, args: self.compare(held.pop(), args[0], int(find_clock(job.model).index))
            ),
        ]

    @torch.no_grad()
    def compare(self, softmax: Tensor, value: Tensor, step: int) -> None:
        """Add the squared error of softmax v with either grid.

        The error of the softmax alone says less: errors in a row can have one sign and add up.
        """
        row = step if self.per_step else 0
        for kind in (0, 1):
            log2 = torch.full_like(self.peak, kind, dtype=torch.bool)
            grid = self.form.choose(self.uniform, self.peak, log2)
            grid = Grid(grid.scale[row].to(softmax.device), grid.zero[row].to(softmax.device))
            rounded = self.form.decode(self.form.encode(softmax, grid), grid)
            error = (rounded - softmax).to(value.dtype) @ value
            self.errors[kind, row] += error.float().square().sum().cpu()

    def settle(self, job: Job, name: str, log2: Tensor) -> None:
        """Take log2 at these steps; a softmax that is uniform at every step stays learnable."""
        form = self.form if log2.any() else self.form.uniform
        parts = job.plan.attentions[name]
        job.plan.attentions[name] = parts | {"softmax": replace(parts["softmax"], input=form)}
        self.attention.softmax.format = form
        self.attention.softmax.take(self.form.choose(self.uniform, self.peak, log2))


def _by_error(job: Job, grids: dict[str, _SoftmaxGrids]) -> dict[str, Tensor]:
    """Compare both grids of every softmax in one more pass over all calls."""
    hooks = list(chain.from_iterable(each.hooks(job) for each in grids.values()))
    fit_ranges.run_with_hooks(job, hooks, "softmax quantizers", job.calls)
    return {name: each.errors[1] < each.errors[0] for name, each in grids.items()}


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Assign(per_step=True), TCR(), FitWeights("mse"), TIAR(), Reconstruct())
    fit_inputs = (FitRanges("minmax"), DAQ())
    learn_ranges = (LearnRanges(),) if settings.range_iters else ()
    return (*start, *fit_inputs, PAR(), *fit_inputs, *learn_ranges, Pack())
