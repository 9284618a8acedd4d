"""FitRanges: the ranges of inputs, one for all timesteps or one for each, from one pass over the collected calls."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowtide.formats import SEARCHES, check_search
from lowtide.nn.attention import QuantAttention
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import drop_unused_rows, find_clock, look, quantizers
from lowtide.stages.base import Call, Job

KEPT_VALUES = 2048


@dataclass
class Seen:
    """What one quantizer saw: the ends of its inputs at each step, and a few values in between for searches that weigh them."""

    lo: Tensor
    hi: Tensor
    values: list[list[Tensor]] = field(default_factory=list)

    def note(self, x: Tensor, step: int, generator: torch.Generator | None) -> None:
        """Widen the ends; with a generator, keep a few values too."""
        lo, hi = x.detach().float().aminmax()
        self.lo[step], self.hi[step] = torch.minimum(self.lo[step], lo), torch.maximum(self.hi[step], hi)
        if generator is not None:
            self.values[step].append(some(x.detach().float().flatten(), generator))

    @property
    def called(self) -> bool:
        return bool(torch.isfinite(self.hi).any())


def some(values: Tensor, generator: torch.Generator) -> Tensor:
    """A few of them, drawn from anywhere: every n-th would be one and the same column wherever n is a multiple of a row."""
    if len(values) <= KEPT_VALUES:
        return values
    return values[torch.randint(len(values), (KEPT_VALUES,), generator=generator).to(values.device)]


@dataclass(frozen=True)
class FitRanges:
    """Run the model with its quantized weights over every collected call and fit every input quantizer."""

    search: str = "minmax"

    def __post_init__(self) -> None:
        check_search(self.search)

    def run(self, job: Job) -> None:
        seen = watch(job, keep=self.search != "minmax")
        for name, quantizer in quantizers(job.model).items():
            if seen[name].called:
                quantizer.fit(*ranges(seen[name], quantizer, self.search))
        leave_unseen_attention(job, {name for name, what in seen.items() if not what.called})
        look(job.model, True, True)


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
    look(job.model, True, False)
    for attention in (module for module in job.model.modules() if isinstance(module, QuantAttention)):
        attention.active = True
    for call in job.track(job.calls, words):
        run_call(job, call)
    for hook in hooks:
        hook.remove()


def nothing_seen(steps: int) -> Seen:
    return Seen(torch.full((steps,), float("inf")), torch.full((steps,), float("-inf")), [[] for _ in range(steps)])


def noting(job: Job, seen: Seen, generator: torch.Generator | None):
    clock = find_clock(job.model)
    return lambda module, args: seen.note(args[0], int(clock.index), generator)


@torch.no_grad()
def run_call(job: Job, call: Call) -> Tensor:
    """Run the denoiser on a recorded call."""
    return job.model(**job.on_device(call.arguments))


def ranges(seen: Seen, quantizer: Quantizer, search: str) -> tuple[Tensor, Tensor]:
    """lo and hi per step, or over all steps where the quantizer has one range."""
    if not quantizer.per_step:
        values = [[value for step in seen.values for value in step]]
        seen = replace(seen, lo=seen.lo.min()[None], hi=seen.hi.max()[None], values=values)
    if search == "minmax":
        return seen.lo, seen.hi
    rows = [torch.cat([lo[None], hi[None], *values]) for lo, hi, values in zip(seen.lo, seen.hi, seen.values, strict=True)]
    found = [SEARCHES[search](row[None], quantizer.format) for row in rows]
    return torch.cat([lo for lo, _ in found]), torch.cat([hi for _, hi in found])


def leave_unseen_attention(job: Job, unseen: set[str]) -> None:
    """An attention whose processor never reaches the function we stand in for stays in float, and is said to."""
    for name in list(job.plan.attentions):
        if f"{name}.processor.q" in unseen:
            module = job.model.get_submodule(name)
            module.set_processor(module.processor.inner)
            del job.plan.attentions[name]
            job.plan.left[f"attention of {name}"] = "its processor does not call scaled_dot_product_attention"
    drop_unused_rows(job.model)
