"""FitRanges: the ranges of inputs, one for all timesteps or one for each, from one pass over the collected calls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import SLACK, WATCH, WATCHED_COPIES
from lowtide.formats import SEARCHES, check_search
from lowtide.nn.attention import QuantAttention
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import drop_unused_rows, find_clock, quantizers, set_precision
from lowtide.stages.base import Call, Job, Stage

KEPT_VALUES, TAILS = 2048, 64


class Sample(NamedTuple):
    """A few of a tensor's values, drawn from anywhere; the least and greatest of each of TAILS parts; how many there were.

    The ends of a range are rare values, one in a million, and few that are drawn are near them. Drawn values alone would let a
    search cut off what they do not show; an end beside 2,048 drawn ones weighs five hundred times too much, and is never cut.
    """

    drawn: Tensor
    tails: Tensor
    size: int

    def weights(self) -> Tensor:
        """How many values each of these stands for: a tail for itself, a drawn one for its share of the rest."""
        share = (self.size - len(self.tails)) / len(self.drawn)
        return torch.cat([torch.full_like(self.drawn, share), torch.ones_like(self.tails)])


def sampled(values: Tensor, generator: torch.Generator) -> Sample:
    """Every n-th would be one and the same column wherever n is a multiple of a row. Few values are all kept."""
    if len(values) <= KEPT_VALUES:
        return Sample(values, values[:0], len(values))
    drawn = values[
        torch.randint(len(values), (KEPT_VALUES,), generator=generator).to(values.device)
    ]
    parts = values[: len(values) // TAILS * TAILS].view(-1, TAILS)
    return Sample(drawn, torch.cat(parts.aminmax(dim=0)), len(values))


@dataclass
class Seen:
    """What one quantizer saw: the ends of its inputs at each step, and samples of them for searches that weigh values."""

    lo: Tensor
    hi: Tensor
    samples: list[list[Sample]] = field(default_factory=list)

    def note(self, x: Tensor, step: int, generator: torch.Generator | None) -> None:
        """Widen the ends; with a generator, keep a sample too."""
        values = x.detach().float().flatten()
        lo, hi = values.aminmax()
        self.lo[step], self.hi[step] = (
            torch.minimum(self.lo[step], lo),
            torch.maximum(self.hi[step], hi),
        )
        if generator is not None:
            self.samples[step].append(sampled(values, generator))

    @property
    def called(self) -> bool:
        return bool(torch.isfinite(self.hi).any())

    def drawn(self) -> list[Tensor]:
        """A fair sample of the values at each step."""
        return [torch.cat([sample.drawn for sample in step]) for step in self.samples]

    def rows(self) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step, values with both ends among them, and how many each stands for."""
        for lo, hi, step in zip(self.lo, self.hi, self.samples, strict=True):
            values = [part for sample in step for part in (sample.drawn, sample.tails)]
            weights = torch.cat([lo.new_zeros(2), *(sample.weights() for sample in step)])
            yield torch.cat([lo[None], hi[None], *values]), weights

    def filled(self) -> "Seen":
        """A step that nothing reached, of those a schedule drew none of, is like the nearest that something did."""
        known = torch.isfinite(self.hi).nonzero().flatten().tolist()
        near = [
            min(known, key=lambda other, step=step: abs(other - step))
            for step in range(len(self.hi))
        ]
        return Seen(self.lo[near], self.hi[near], [self.samples[step] for step in near])

    def whole(self) -> "Seen":
        """All steps as one."""
        return Seen(
            self.lo.min()[None],
            self.hi.max()[None],
            [[sample for step in self.samples for sample in step]],
        )


@dataclass(frozen=True)
class FitRanges(Stage):
    """Run the model with its quantized weights over every collected call and fit every input quantizer."""

    essential: ClassVar[bool] = True

    search: str = "minmax"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        seen = watch(job, keep=self.search != "minmax")
        for name, quantizer in quantizers(job.model).items():
            if seen[name].called:
                quantizer.fit(*ranges(seen[name], quantizer, self.search))
        leave_unseen_attention(job, {name for name, what in seen.items() if not what.called})
        set_precision(job.model, Precision.FULL)

    def cost(self, load: Workload) -> Cost:
        """Every recorded call with quantized weights; a search also draws a sample of all values."""
        return watching_cost(load, search=self.search != "minmax")


def watch(job: Job, keep: bool) -> dict[str, Seen]:
    """One pass over all calls with float inputs; every quantizer notes what reaches it."""
    steps = len(find_clock(job.model).known)
    seen = {name: nothing_seen(steps) for name in quantizers(job.model)}
    draws = {name: job.generator("seen", name) if keep else None for name in seen}
    hooks = [
        quantizer.register_forward_pre_hook(noting(job, seen[name], draws[name]))
        for name, quantizer in quantizers(job.model).items()
    ]
    hear(job, hooks, "input ranges")
    return seen


def hear(job: Job, hooks: Sequence[RemovableHandle], words: str) -> None:
    """Run all calls with float inputs, attention by way of its quantizers, for these hooks, which are then taken off."""
    set_precision(job.model, Precision.WEIGHTS)
    for attention in (
        module for module in job.model.modules() if isinstance(module, QuantAttention)
    ):
        attention.active = True
    for call in job.track(job.calls, words):
        run_call(job, call)
    for hook in hooks:
        hook.remove()


def nothing_seen(steps: int) -> Seen:
    return Seen(
        torch.full((steps,), float("inf")),
        torch.full((steps,), float("-inf")),
        [[] for _ in range(steps)],
    )


def noting(job: Job, seen: Seen, generator: torch.Generator | None):
    clock = find_clock(job.model)
    return lambda module, args: seen.note(args[0], int(clock.index), generator)


@torch.no_grad()
def run_call(job: Job, call: Call) -> Tensor:
    """Run the denoiser on a recorded call."""
    return job.model(**job.on_device(call.arguments))


def ranges(seen: Seen, quantizer: Quantizer, search: str) -> tuple[Tensor, Tensor]:
    """lo and hi per step, or over all steps where the quantizer has one range."""
    seen = seen.filled() if quantizer.per_step else seen.whole()
    if search == "minmax":
        return seen.lo, seen.hi
    found = [
        SEARCHES[search](values[None], quantizer.format, weights) for values, weights in seen.rows()
    ]
    return torch.cat([lo for lo, _ in found]), torch.cat([hi for _, hi in found])


def leave_unseen_attention(job: Job, unseen: set[str]) -> None:
    """An attention whose processor never reaches the function we stand in for stays in float, and is said to."""
    for name in list(job.plan.attentions):
        if f"{name}.processor.q" in unseen:
            module = job.model.get_submodule(name)
            module.set_processor(module.processor.inner)
            del job.plan.attentions[name]
            job.plan.left[f"attention of {name}"] = (
                "its processor does not call scaled_dot_product_attention"
            )
    drop_unused_rows(job.model)


def watching_cost(load: Workload, *, search: bool) -> Cost:
    """What `watch` costs; with `search`, the values that are kept and searched too."""
    whole = load.network.whole
    watched = load.batch * (WATCH * whole.reads + WATCHED_COPIES * whole.scores)
    work = load.decoding() + Work(values=watched, calls=5 * whole.layers)
    quantizers = whole.layers + 4 * len(load.network.adapter.attentions())
    values = (KEPT_VALUES + 2 * TAILS) * load.calls * quantizers if search else 0
    attention = SLACK * FLOAT * WATCHED_COPIES * load.batch * load.network.largest_scores
    seconds = load.passes(load.calls, work) + values * load.speed.search
    return Cost(seconds, load.alive_bytes(load.batch) + attention + FLOAT * values)
