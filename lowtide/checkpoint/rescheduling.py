"""Another schedule for a packed model, without another calibration.

A packed model runs timesteps that it was not calibrated for by adding steps as they come
(nn/extension.py). This module makes another schedule the model's own: its tables hold the steps of
the new schedule and no others, and a saved folder has them. Temporal features change quickly with
t, so they are computed at the new timesteps by the block that the checkpoint keeps, and rounded as
before, each (t, block, chunk) on a range that is searched again: they are those of a model that was
quantized for this schedule. Input ranges and corrections were measured on images and change slowly
with t. They are interpolated between the two nearest calibrated timesteps.

Start from the checkpoint that was calibrated, not from one that was rescheduled: a short schedule
has lost the rows that it left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
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
from lowtide.formats import Stepped
from lowtide.machine.device_names import AUTO
from lowtide.nn.correction import Correction
from lowtide.nn.extension import (
    Neighbours,
    forget_added_steps,
    interpolated_correction,
    interpolated_ranges,
    kept_features,
)
from lowtide.nn.feature_cache import Cached
from lowtide.nn.plan import Plan
from lowtide.nn.request_cache import request_caches
from lowtide.nn.request_features import PerRequest
from lowtide.nn.swap import find_clock
from lowtide.sampling.pipelines import Pipeline
from lowtide.settings import CallValues, SchedulerName, SpacingName

Target = str | Path | DiffusionPipeline | Pipeline | quantized_pipeline.Quantized


@dataclass(frozen=True)
class Change:
    """The plan before and after."""

    before: Plan
    after: Plan

    @property
    def neighbours(self) -> Neighbours:
        """The old steps around each new timestep."""
        return Neighbours.of(list(self.before.times), list(self.after.times))

    @property
    def farthest(self) -> float:
        """The largest distance of a new timestep from the nearest old one."""
        old = torch.tensor(self.before.times)[self.neighbours.nearest]
        return float((old - torch.tensor(self.after.times)).abs().max())


def reschedule(
    target: Target,
    steps: int,
    *,
    size: int | None = None,
    call: CallValues | None = None,
    device: str = AUTO,
) -> quantized_pipeline.Quantized:
    """Make `steps` sampling steps of its pipeline's own scheduler a packed model's schedule.

    Cached temporal features are computed again by the block that the checkpoint keeps. Input ranges
    and corrections are interpolated between calibrated timesteps.

    Args:
        target: a folder that lowtide wrote, a packed pipeline, or what `lowtide.quantize` returned;
            the latter two are changed in place.
        steps: sampling steps of the new schedule.
        size: height and width of the images, for schedulers whose timesteps depend on it.
        call: more arguments of the pipeline's call, where it needs them, such as a picture.
        device: where a model that is named by path computes: "auto", "cpu", "cuda" and more.

    Returns:
        The pipeline, its new plan, and what was computed again.

    Examples:
        >>> import lowtide
        >>> quantized = lowtide.quantize("zoo:digits", method="tfmq", steps=4, images=2, iters=1)
        >>> lowtide.reschedule(quantized, 8).plan.summary["steps"]
        8
    """
    pipe, plan = _packed(target, device)
    labels = (0,) if "labels" in sampling.supported_fields(pipe) else ()
    request = sampling.Request(steps, labels=labels, size=size, call=call or {})
    return _rescheduled_to(pipe, plan, request)


def _rescheduled_to(
    pipe: Pipeline, plan: Plan, request: sampling.Request
) -> quantized_pipeline.Quantized:
    """The packed pipeline with the schedule of this request."""
    steps = request.steps
    model = sampling.denoiser(pipe)
    _check(plan, steps)
    forget_added_steps(model)
    adapter = facts.float_adapter(model, plan) if plan.cached else None
    change = _change(plan, steps, _visited(pipe, request, plan))
    features: dict[str, Tensor] = {}
    if adapter:
        times = torch.tensor(change.after.times, dtype=torch.float32)
        features = kept_features(model, adapter, list(plan.cached), times)
    _update_tables(model, change, features)
    if facts.packed_plan(model).summary:
        diffusers_hook.attach(model, change.after)
    return quantized_pipeline.Quantized(pipe, change.after, _report(model, change, features))


def _packed(target: Target, device: str) -> tuple[Pipeline, Plan]:
    """The pipeline and its plan."""
    if isinstance(target, quantized_pipeline.Quantized):
        return target.pipe, target.plan
    pipe = sampling.as_pipeline(target, device=device)
    return pipe, facts.packed_plan(sampling.denoiser(pipe))


def _check(plan: Plan, steps: int) -> None:
    """Something depends on the step, and the block that is needed is there."""
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
    if any(isinstance(each.input, Stepped) for each in plan.all_plans()):
        raise BadInput(
            "found inputs whose bits differ from step to step",
            "the same bits at every step",
            f"quantize again with --steps {steps}, or without stepaware.apply",
        )
    if alone := [name for name, cache in plan.cached.items() if not cache.kept]:
        raise BadInput(
            f"found {len(alone)} cached temporal features without the block "
            f"that they came from (first: {alone[0]})",
            "a checkpoint that kept it",
            f"quantize again without --only-schedule, or with --steps {steps}",
        )


def _visited(pipe: Pipeline, request: sampling.Request, plan: Plan) -> dict[int, float]:
    """The timesteps of one image by integer key, as the denoiser receives them, in order."""
    timesteps: dict[int, float] = {}
    with _answering_at_any_time(sampling.denoiser(pipe), plan):
        for moment in sampling.trajectory(pipe, request):
            time = float(moment.t[0])
            timesteps.setdefault(round(time * plan.ticks), time)
    return timesteps


@contextmanager
def _answering_at_any_time(model: nn.Module, plan: Plan) -> Iterator[None]:
    """Allow unknown timesteps, and answer every call with the first answer.

    The timesteps that a sampler visits do not depend on the answers.
    """
    clock = find_clock(model)
    keyed = clock.keyed
    forward = model.forward
    instance_forward = vars(model).get("forward")
    answers: list[object] = []

    @wraps(forward)
    def repeated(*args: object, **kwargs: object) -> object:
        if not answers:
            answers.append(forward(*args, **kwargs))
        return answers[0]

    clock.keyed = False
    clock.index = torch.zeros((), dtype=torch.long)
    model.forward = repeated
    try:
        yield
    finally:
        clock.keyed = keyed
        del model.forward
        if instance_forward is not None:
            model.forward = instance_forward
        # Answers that were computed meanwhile belong to no timestep.
        for cache in request_caches(model):
            cache.set_plan(plan)


def _change(plan: Plan, steps: int, visited: dict[int, float]) -> Change:
    """The plan with the new timesteps."""
    after = replace(
        plan,
        timesteps=tuple(visited),
        times=tuple(visited.values()),
        summary=plan.summary | {"steps": steps},
    )
    return Change(plan, after)


def _update_tables(model: nn.Module, change: Change, features: dict[str, Tensor]) -> None:
    """Replace every table that is keyed by timestep."""
    clock = find_clock(model)
    if clock.per_step:
        clock.scale, clock.zero = interpolated_ranges(model, change.neighbours)
    clock.reschedule(change.after.timesteps, change.after.times)
    for name, module in model.named_modules():
        if isinstance(module, Cached):
            module.take(features[name])
        elif isinstance(module, Correction):
            module.take(*interpolated_correction(module, change.neighbours))
        elif isinstance(module, PerRequest):
            module.take_steps(change.neighbours.nearest)
    for cache in request_caches(model):
        cache.set_plan(change.after)


def _report(model: nn.Module, change: Change, features: dict[str, Tensor]) -> dict[str, object]:
    return {
        "from": change.before.summary["steps"],
        "features": len(features),
        "farthest": change.farthest,
        "timesteps": list(change.after.timesteps),
        "account": file_format.account(model),
    }


def reschedule_to_folder(
    source: str | Path,
    out: str | Path,
    steps: int,
    *,
    scheduler: SchedulerName | None = None,
    spacing: SpacingName | None = None,
    device: str = AUTO,
) -> dict[str, object]:
    """Load, reschedule, save; `scheduler` and `spacing` are the pipeline's own if not given.

    The record is copied, so that the result can be evaluated.
    """
    out = Path(out)
    folders.recover_missing(source)
    home = sampling.local_folder(source)
    with folders.written_beside(out, source=home) as fresh:
        record = provenance.read(home)
        pipe = sampling.as_pipeline(source, device=device)
        pipe = sampling.scheduled(pipe, scheduler, spacing)
        plan = facts.packed_plan(sampling.denoiser(pipe))
        labels = (0,) if "labels" in sampling.supported_fields(pipe) else ()
        request = sampling.Request(steps, labels=labels, **_recorded(record))
        result = _rescheduled_to(pipe, plan, request)
        result.write(fresh)
        report: dict[str, object] = {
            "model": str(source),
            "folder": str(out),
            "method": result.plan.method,
            "on_disk": facts.on_disk(fresh),
        }
        report |= result.plan.summary | result.report
        if record:
            changes = {"steps": steps, "scheduler": scheduler, "spacing": spacing}
            asked = {name: value for name, value in changes.items() if value is not None}
            _rescheduled(record, asked, report).write(fresh)
    return report


def _recorded(record: provenance.Provenance | None) -> dict[str, Any]:
    """What the timesteps of the calibration may depend on, and what its pipeline needs."""
    settings = record.settings if record else {}
    names = [name for name in ("size", "pictures", "call") if settings.get(name)]
    return {name: settings[name] for name in names}


def _rescheduled(
    record: provenance.Provenance, changes: dict[str, object], report: dict[str, object]
) -> provenance.Provenance:
    """The record of the calibrated model, with the new schedule and this report."""
    return replace(
        record,
        command=provenance.command(),
        settings=record.settings | changes,
        report=record.report | {"rescheduled": report},
    )
