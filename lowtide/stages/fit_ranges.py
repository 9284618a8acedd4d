"""FitRanges: the ranges of inputs, one for all timesteps or one each, from the recorded calls."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import MINMAX_PASSES, SLACK, STATISTICS_COPIES
from lowtide.formats import SEARCHES, check_search
from lowtide.models import Answer, answer_of
from lowtide.nn.attention import QuantAttention, attention_block, set_unrounded
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import drop_unused_rows, find_clock, quantizers, set_precision
from lowtide.stages.base import Call, Job, Stage, part_of

KEPT_VALUES = 2048
TAILS = 64


class Sample(NamedTuple):
    """A sample of a tensor's values.

    drawn: values drawn at random.
    tails: the least and the greatest value of each of TAILS parts of the tensor.
    size: the number of values of the tensor.

    The ends of a range are rare values, one in a million, and few drawn values are near them. From
    drawn values alone, a search would cut off the values that they do not show. An end that weighs
    as much as one of 2,048 drawn values weighs five hundred times too much, and is never cut.
    """

    drawn: Tensor
    tails: Tensor
    size: int

    def weights(self) -> Tensor:
        """How many values each one stands for: a tail for itself, a drawn one for its share."""
        share = (self.size - len(self.tails)) / len(self.drawn)
        return torch.cat([torch.full_like(self.drawn, share), torch.ones_like(self.tails)])


def sampled(values: Tensor, generator: torch.Generator) -> Sample:
    """A sample of values, (n,); few values are all kept.

    Every n-th value would be one and the same column wherever n is a multiple of a row's length.
    """
    if len(values) <= KEPT_VALUES:
        return Sample(drawn=values, tails=values[:0], size=len(values))
    places = torch.randint(len(values), (KEPT_VALUES,), generator=generator)
    parts = values[: len(values) // TAILS * TAILS].view(-1, TAILS)
    tails = torch.cat(parts.aminmax(dim=0))
    return Sample(drawn=values[places.to(values.device)], tails=tails, size=len(values))


@dataclass
class InputStatistics:
    """Statistics of one quantizer's inputs at each step.

    lo, hi: minimum and maximum, (steps,); infinite where the quantizer is not called.
    samples: samples of the values, for searches that weigh them.
    """

    lo: Tensor
    hi: Tensor
    samples: list[list[Sample]] = field(default_factory=list)

    @classmethod
    def empty(cls, steps: int, device: torch.device | None = None) -> "InputStatistics":
        """Empty statistics, on the device of the values that will be added."""
        return cls(
            lo=torch.full((steps,), float("inf"), device=device),
            hi=torch.full((steps,), float("-inf"), device=device),
            samples=[[] for _ in range(steps)],
        )

    def add(self, x: Tensor, step: int, generator: torch.Generator | None) -> None:
        """Add the values of a tensor; with a generator, keep a sample of them."""
        values = x.detach().float().flatten()
        lo, hi = values.aminmax()
        self.lo[step] = torch.minimum(self.lo[step], lo)
        self.hi[step] = torch.maximum(self.hi[step], hi)
        if generator is not None:
            self.samples[step].append(sampled(values, generator))

    @property
    def called(self) -> bool:
        """Whether the quantizer was called at any step."""
        return bool(torch.isfinite(self.hi).any())

    def drawn(self) -> list[Tensor]:
        """A fair sample of the values at each step."""
        return [torch.cat([sample.drawn for sample in step]) for step in self.samples]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, values with both ends among them, and how many each one stands for."""
        for lo, hi, step in zip(self.lo, self.hi, self.samples, strict=True):
            values = [lo[None], hi[None]]
            weights = [lo.new_zeros(2)]
            for sample in step:
                values += [sample.drawn, sample.tails]
                weights.append(sample.weights())
            yield torch.cat(values), torch.cat(weights)

    def filled(self) -> "InputStatistics":
        """A step without values gets those of the nearest step that has some.

        A stage that draws timesteps may leave some of the schedule's steps out.
        """
        known = torch.isfinite(self.hi).nonzero().flatten().tolist()
        nearest = [
            min(known, key=lambda other, step=step: abs(other - step))
            for step in range(len(self.hi))
        ]
        return InputStatistics(
            self.lo[nearest], self.hi[nearest], [self.samples[step] for step in nearest]
        )

    def whole(self) -> "InputStatistics":
        """All steps as one."""
        samples: list[Sample] = []
        for step in self.samples:
            samples += step
        return InputStatistics(self.lo.min()[None], self.hi.max()[None], [samples])


@dataclass(frozen=True)
class FitRanges(Stage):
    """Run the model with quantized weights over every recorded call and fit every input range."""

    essential: ClassVar[bool] = True

    search: str = "minmax"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        statistics = input_statistics(job, keep=self.search != "minmax")
        constant: list[str] = []
        for name, quantizer in quantizers(job.model).items():
            if statistics[name].called:
                lo, hi = ranges(statistics[name], quantizer, self.search)
                quantizer.fit(lo, hi)
                if torch.equal(lo, hi):
                    constant.append(name.removesuffix(".input"))
        job.report["constant_inputs"] = constant
        _leave_uncalled_attention(
            job, {name for name, each in statistics.items() if not each.called}
        )
        set_precision(job.model, Precision.FULL)

    def cost(self, load: Workload) -> Cost:
        """Every recorded call with quantized weights; a search also samples all values."""
        return statistics_cost(load, search=self.search != "minmax")

    def summary(self, job: Job) -> str:
        constant = len(job.report.get("constant_inputs", []))
        note = f", {constant} of them of one value alone" if constant else ""
        return f"ranges of {len(quantizers(job.model))} inputs fitted{note}"


def input_statistics(job: Job, *, keep: bool) -> dict[str, InputStatistics]:
    """Statistics of every quantizer's inputs, from one pass over all calls with float inputs.

    keep: keep samples too. Minima and maxima are shared out, a part of the calls to each rank;
        samples are drawn one after the other, so every rank runs all calls for them.
    """
    steps = len(find_clock(job.model).known)
    statistics: dict[str, InputStatistics] = {}
    hooks: list[RemovableHandle] = []
    for name, quantizer in quantizers(job.model).items():
        statistics[name] = InputStatistics.empty(steps, job.device)
        generator = job.generator("seen", name) if keep else None
        hook = _adding(job, statistics[name], generator)
        hooks.append(quantizer.register_forward_pre_hook(hook))
    run_with_hooks(job, hooks, "input ranges", job.calls if keep else job.world.part(job.calls))
    if not keep:
        each = statistics.values()
        job.world.extremes([one.lo for one in each], [one.hi for one in each])
    return statistics


def run_with_hooks(
    job: Job, hooks: Sequence[RemovableHandle], title: str, calls: Sequence[Call]
) -> None:
    """Run these calls with float inputs for these hooks, then remove them.

    Attention calls its quantizers, which round nothing.
    """
    set_precision(job.model, Precision.WEIGHTS)
    for module in job.model.modules():
        if isinstance(module, QuantAttention):
            module.active = True
    for call in job.track(calls, title):
        run_call(job, call)
    for hook in hooks:
        hook.remove()


def _adding(
    job: Job, statistics: InputStatistics, generator: torch.Generator | None
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds a quantizer's input to its statistics."""
    clock = find_clock(job.model)

    def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        statistics.add(args[0], int(clock.index), generator)

    return add


@torch.no_grad()
def run_call(job: Job, call: Call) -> Answer:
    """Run the denoiser on a recorded call, in parts where memory is short.

    Hooks then see the parts one after the other, and those of an attempt that failed too. Minima
    and maxima stay the same; samples of values are drawn from each part.
    """
    samples = len(call.arguments["timestep"])

    def run(span: slice) -> Answer:
        whole = span.stop - span.start == samples
        arguments = call.arguments if whole else part_of(call.arguments, span, job.adapter)
        return job.model(**job.on_device(arguments))

    parts = job.room.each(samples, run)
    return parts[0] if len(parts) == 1 else torch.cat([answer_of(part) for part in parts])


def ranges(statistics: InputStatistics, quantizer: Quantizer, search: str) -> tuple[Tensor, Tensor]:
    """lo and hi of each step, or one pair where the quantizer has one range for all steps."""
    statistics = statistics.filled() if quantizer.per_step else statistics.whole()
    if search == "minmax":
        return statistics.lo, statistics.hi
    pairs = [
        SEARCHES[search](values[None], quantizer.format, weights)
        for values, weights in statistics.rows()
    ]
    return torch.cat([lo for lo, _ in pairs]), torch.cat([hi for _, hi in pairs])


def _leave_uncalled_attention(job: Job, uncalled: set[str]) -> None:
    """Leave an attention in float if its quantizers are never called, and say so in the plan.

    Its processor does not call the function that calls the quantizers.
    """
    for name in list(job.plan.attentions):
        if any(f"{name}.processor.{part}" in uncalled for part in ("q", "softmax")):
            block = attention_block(job.model, name)
            set_unrounded(block)
            del job.plan.attentions[name]
            job.plan.left[f"attention of {name}"] = (
                "its processor does not call scaled_dot_product_attention"
            )
    drop_unused_rows(job.model)


def statistics_cost(load: Workload, *, search: bool) -> Cost:
    """The cost of `input_statistics`; with `search`, also of keeping samples and of the search."""
    whole = load.network.whole
    watched = load.batch * (MINMAX_PASSES * whole.reads + STATISTICS_COPIES * whole.scores)
    work = load.decoding() + Work(values=watched, calls=5 * whole.layers)
    inputs = whole.layers + 4 * len(load.network.adapter.attentions())
    values = (KEPT_VALUES + 2 * TAILS) * load.calls * inputs if search else 0
    attention = SLACK * FLOAT * STATISTICS_COPIES * load.batch * load.network.largest_scores
    seconds = load.passes(load.calls, work) + values * load.speed.search
    return Cost(seconds, load.alive_bytes(load.batch) + attention + FLOAT * values)
