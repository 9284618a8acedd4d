"""Another schedule for a packed model: cached features made anew at its timesteps, every other table by the nearest old one.

What a checkpoint keys by timestep is of two kinds. Temporal features (nn/temporal.py) turn fast with t, so a neighbour's are
wrong: they are computed at the new timesteps by the float layers that `keep_temporal` left in, and quantized as they were,
each (t, block, chunk) on a range searched anew. Input ranges and corrections were measured on pictures, and change slowly
with t: a new timestep takes those of the nearest calibrated one (the earlier in sampling, where two are as near). Nearest
and not interpolated, because a row is one grid: between a scale with its zero and another there need be no grid at all
(zeros are integers, a softmax's says uniform or log2), while the neighbour's has been in use at nearly this noise.

Start from the checkpoint that was calibrated, not from one that was rescheduled: what a short schedule left out is gone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowtide import sampling
from lowtide.checkpoint import (
    diffusers_hook,
    facts,
    file_format,
    folders,
    provenance,
    quantized_pipeline,
)
from lowtide.errors import BadInput
from lowtide.models import Adapter
from lowtide.nn.correction import CORRECTION
from lowtide.nn.plan import Plan
from lowtide.nn.precision import Precision
from lowtide.nn.request_cache import reschedule_requests
from lowtide.nn.swap import find_clock
from lowtide.stages.temporal_features import TemporalFeatures


@dataclass(frozen=True)
class Change:
    """From the timesteps of a plan to those that a sampler visits (by their integer keys), and the nearest old step of each."""

    before: Plan
    after: Plan
    visited: tuple[Tensor, ...]
    nearest: Tensor

    @property
    def farthest(self) -> float:
        """How far the worst served new timestep is from the old one whose ranges it takes."""
        old = torch.tensor(self.before.timesteps)[self.nearest]
        return float((old - torch.tensor(self.after.timesteps)).abs().max()) / self.before.ticks


def reschedule(target: Any, steps: int, *, size: int | None = None) -> quantized_pipeline.Quantized:
    """Make a packed model fit `steps` sampling steps of its pipeline's own scheduler.

    `target` is a folder that lowtide wrote, a packed pipeline, or what `lowtide.quantize` gave back; the latter two are
    changed in place. Cached temporal features are made anew from the float layers that `keep_temporal` left in the
    checkpoint; input ranges and corrections are those of the nearest calibrated timestep. `size`: that of the pictures, for
    schedulers whose timesteps depend on it.
    """
    pipe, plan = packed(target)
    request = sampling.Request(
        steps, labels=(0,) if "labels" in sampling.heeded(pipe) else (), size=size
    )
    model = sampling.denoiser(pipe)
    check(plan, steps)
    adapter = facts.float_adapter(model, plan) if plan.cached else None
    change = planned(plan, steps, visited(pipe, request, plan))
    features = float_features(model, adapter, change) if adapter else {}
    turn(model, change, features)
    if facts.packed_plan(model).summary:
        diffusers_hook.attach(model, change.after)
    return quantized_pipeline.Quantized(pipe, change.after, told(model, change, features))


def packed(target: Any) -> tuple[Any, Plan]:
    """The pipeline and its plan."""
    if isinstance(target, quantized_pipeline.Quantized):
        return target.pipe, target.plan
    pipe = sampling.load_pipeline(target) if isinstance(target, str | Path) else target
    return pipe, facts.packed_plan(sampling.denoiser(pipe))


def check(plan: Plan, steps: int) -> None:
    """Something is to be done, and the float layers that it needs are there."""
    if not plan.summary:
        raise BadInput(
            "found no model that lowtide packed",
            "a packed one",
            f"quantize it with --steps {steps}",
        )
    if not plan.keyed:
        raise BadInput(
            "found a packed model in which nothing depends on the step",
            "cached features, or ranges by step",
            f"sample it with --steps {steps} as it is",
        )
    if gone := [name for name, cache in plan.cached.items() if not cache.kept]:
        raise BadInput(
            f"found {len(gone)} cached temporal features without the float layers that they came from (first: {gone[0]})",
            "a checkpoint that kept them",
            f"quantize again with --keep-temporal, or with --steps {steps}",
        )


def visited(pipe: Any, request: sampling.Request, plan: Plan) -> dict[int, Tensor]:
    """What the denoiser hears as timestep at each step of one image, by integer key, in order of first visit."""
    found: dict[int, Tensor] = {}
    with answering_at_any_time(sampling.denoiser(pipe), plan):
        for moment in sampling.trajectory(pipe, request):
            found.setdefault(round(float(moment.t[0]) * plan.ticks), moment.t[0])
    return found


@contextmanager
def answering_at_any_time(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Unknown timesteps are no error, and the first answer serves for all: where a sampler goes does not depend on them."""
    clock, forward, own = find_clock(model), model.forward, vars(model).get("forward")
    keyed, answers = clock.keyed, []

    @wraps(forward)
    def repeated(*args: Any, **kwargs: Any) -> Any:
        return answers[0] if answers else answers.append(forward(*args, **kwargs)) or answers[0]

    clock.keyed, clock.index, model.forward = False, torch.zeros((), dtype=torch.long), repeated
    try:
        yield
    finally:
        clock.keyed = keyed
        del model.forward
        if own is not None:
            model.forward = own
        # A request that was answered meanwhile was answered without a clock.
        reschedule_requests(model, plan)


def planned(plan: Plan, steps: int, heard: dict[int, Tensor]) -> Change:
    """The plan with the new timesteps, and where their tables come from."""
    times, summary = tuple(float(time) for time in heard.values()), plan.summary | {"steps": steps}
    after = replace(plan, timesteps=tuple(heard), times=times, summary=summary)
    return Change(plan, after, tuple(heard.values()), nearest(plan.timesteps, after.timesteps))


def nearest(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """For each new timestep the place of the nearest old one."""
    return (torch.tensor(new)[:, None] - torch.tensor(old)[None]).abs().argmin(1)


@torch.no_grad()
def float_features(model: nn.Module, adapter: Adapter, change: Change) -> dict[str, Tensor]:
    """Every cached feature as the kept float layers answer it at the new timesteps."""
    rows, found = [{"timestep": time} for time in change.visited], {}
    for unit in (
        unit for unit in adapter.temporal() if set(unit.features) & change.before.cached.keys()
    ):
        caches = [model.get_submodule(name) for name in unit.features]
        for cache in caches:
            cache.set_precision(Precision.FLOAT)
        found |= dict(zip(unit.features, TemporalFeatures(adapter, unit, rows)(model), strict=True))
        for cache in caches:
            cache.set_precision(Precision.FULL)
    return found


def turn(model: nn.Module, change: Change, features: dict[str, Tensor]) -> None:
    """Every table that is keyed by timestep, from the old schedule to the new one."""
    find_clock(model).reschedule(change.after.timesteps, change.nearest, change.before.per_step)
    if change.before.corrected:
        model.get_submodule(CORRECTION).reschedule(change.nearest)
    for name, feature in features.items():
        model.get_submodule(name).take(feature)
    reschedule_requests(model, change.after)


def told(model: nn.Module, change: Change, features: dict[str, Tensor]) -> dict[str, Any]:
    """What was done."""
    came = {
        "from": change.before.summary["steps"],
        "features": len(features),
        "farthest": change.farthest,
    }
    return came | {"timesteps": list(change.after.timesteps), "account": file_format.account(model)}


def reschedule_to_folder(source: str | Path, out: str | Path, steps: int) -> dict[str, Any]:
    """Load, reschedule, save; the record goes along, so that the result can be evaluated like any other."""
    out, written = Path(out), provenance.read(sampling.local_folder(source))
    folders.check_place(out)
    result = reschedule(source, steps, size=written and written.settings.get("size"))
    result.save(out)
    found = {
        "model": str(source),
        "folder": str(out),
        "method": result.plan.method,
        "on_disk": facts.on_disk(out),
    }
    found |= result.plan.summary | result.report
    if written:
        fields = asdict(written) | {
            "command": provenance.command(),
            "settings": written.settings | {"steps": steps},
        }
        provenance.Record(**fields | {"report": written.report | {"rescheduled": found}}).write(out)
    return found
