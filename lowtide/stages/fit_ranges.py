"""FitRanges: the ranges of inputs, one for all timesteps or one each, from the recorded calls."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

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
from lowtide.stages.timed_parts import Bounds, TimedParts, bounds_of_each
from lowtide.stages.value_statistics import KEPT_VALUES, TAILS, InputStatistics

# In a record: the numbers of its calls; the state of a generator after them.
CALLS = "calls"
DRAWS = "draws"


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
        rounding = quantizers(job.model)

        def search(name: str) -> Bounds:
            return ranges(statistics[name], rounding[name], self.search)

        called = [name for name in rounding if statistics[name].called]
        for name, (lo, hi) in bounds_of_each(job, "FitRanges", called, search).items():
            rounding[name].fit(lo.to(job.device), hi.to(job.device))
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
    seen = SeenInputs(job, keep=keep)
    numbers = list(range(len(job.calls)))
    seen.run(numbers if keep else job.world.part(numbers))
    if not keep:
        each = seen.statistics.values()
        job.world.extremes([one.lo for one in each], [one.hi for one in each])
    return seen.statistics


class SeenInputs:
    """The statistics of all calls so far, which hooks add to. Records hold those of some calls."""

    def __init__(self, job: Job, *, keep: bool):
        self.job = job
        self.names = list(quantizers(job.model))
        self.parts = TimedParts(job, "InputStatistics")
        # Where every rank sees all calls, those of a record could come from another card.
        self.recorded = job.world.size == 1 or not keep
        self.generators = {name: job.generator("seen", name) for name in self.names if keep}
        self.statistics = self._empty()
        self.fresh = self._empty()

    def _empty(self) -> dict[str, InputStatistics]:
        steps = len(find_clock(self.job.model).known)
        return {name: InputStatistics.empty(steps, self.job.device) for name in self.names}

    def run(self, numbers: Sequence[int]) -> None:
        """Add the inputs of the calls of these numbers."""
        hooks = [
            quantizer.register_forward_pre_hook(self._adding(name))
            for name, quantizer in quantizers(self.job.model).items()
        ]
        with hooked(self.job, hooks):
            self._run(self.job.track(numbers, "input ranges"))

    def _run(self, numbers: Iterable[int]) -> None:
        fresh: list[int] = []
        known: set[int] = set()
        for number in numbers:
            if number in known:
                continue
            # A record holds the calls that follow one another, and where the draws then are.
            record = self.parts.recorded(str(number)) if self.recorded and not fresh else None
            if record is not None:
                known.update(record.pop(CALLS).tolist())
                self._take(record)
                continue
            run_call(self.job, self.job.calls[number])
            fresh.append(number)
            if self.recorded and self.parts.due:
                self.parts.record(str(fresh[0]), self._tensors() | {CALLS: torch.tensor(fresh)})
                self._join()
                fresh = []
        self._join()

    def _adding(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook that adds a quantizer's input to its statistics."""
        clock = find_clock(self.job.model)
        generator = self.generators.get(name)

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.fresh[name].add(args[0], int(clock.index), generator)

        return add

    def _join(self) -> None:
        """Add the statistics since the last record to those before."""
        for name, fresh in self.fresh.items():
            self.statistics[name].join(fresh)
        self.fresh = self._empty()

    def _tensors(self) -> dict[str, Tensor]:
        """The statistics since the last record, and the state of every generator."""
        states = {f"{name} {DRAWS}": each.get_state() for name, each in self.generators.items()}
        tensors: dict[str, Tensor] = {}
        for name, each in self.fresh.items():
            tensors |= {f"{name} {part}": value for part, value in each.tensors().items()}
        return tensors | states

    def _take(self, record: Mapping[str, Tensor]) -> None:
        """Add the statistics of a record, and draw on from there."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
        for title, value in record.items():
            name, _, part = title.partition(" ")
            parts[name][part] = value
        for name, values in parts.items():
            if name in self.generators:
                self.generators[name].set_state(values.pop(DRAWS))
            self.statistics[name].join(InputStatistics.of(values, self.job.device))


def run_with_hooks(
    job: Job, hooks: Sequence[RemovableHandle], title: str, calls: Sequence[Call]
) -> None:
    """Run these calls with float inputs for these hooks, then remove them."""
    with hooked(job, hooks):
        for call in job.track(calls, title):
            run_call(job, call)


@contextmanager
def hooked(job: Job, hooks: Sequence[RemovableHandle]) -> Iterator[None]:
    """Within the context, weights are quantized and inputs are float, for these hooks.

    Attention calls its quantizers, which round nothing.
    """
    set_precision(job.model, Precision.WEIGHTS)
    for module in job.model.modules():
        if isinstance(module, QuantAttention):
            module.active = True
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
