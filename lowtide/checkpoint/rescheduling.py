"""Another schedule for a packed model, without another calibration.

A checkpoint keys two kinds of tables by timestep. Temporal features (nn/feature_cache.py) change
quickly with t, so those of a neighbour are wrong. They are computed at the new timesteps by the
float layers that `keep_temporal` left in the checkpoint, and quantized as before, each (t, block,
chunk) on a range that is searched again. Input ranges and corrections were measured on images and
change slowly with t. A new timestep uses those of the nearest calibrated one; of two that are
equally near, those of the earlier in sampling. They are not interpolated, because a row is one
grid: between two pairs of scale and zero point there may be no grid (zero points are integers, and
the row of a softmax says uniform or log2), while the neighbour's grid was used at nearly this noise
level.

Start from the checkpoint that was calibrated, not from one that was rescheduled: a short schedule
has lost the rows that it left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import cast

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
from lowtide.models import Adapter
from lowtide.nn.correction import CORRECTION, Correction
from lowtide.nn.feature_cache import Cached
from lowtide.nn.plan import Plan
from lowtide.nn.precision import Precision
from lowtide.nn.request_cache import reschedule_requests
from lowtide.nn.swap import find_clock
from lowtide.sampling.pipelines import Pipeline
from lowtide.stages.temporal_features import TemporalFeatures

Target = str | Path | DiffusionPipeline | Pipeline | quantized_pipeline.Quantized


@dataclass(frozen=True)
class Change:
    """The plan before and after, and where the new tables come from.

    visited: the timesteps of the sampler, as the denoiser receives them, in order. nearest: (T,),
    for each of them the index of the nearest old timestep.
    """

    before: Plan
    after: Plan
    visited: tuple[Tensor, ...]
    nearest: Tensor

    @property
    def farthest(self) -> float:
        """The largest distance of a new timestep from the old one whose ranges it uses."""
        old = torch.tensor(self.before.timesteps)[self.nearest]
        new = torch.tensor(self.after.timesteps)
        return float((old - new).abs().max()) / self.before.ticks


def reschedule(
    target: Target, steps: int, *, size: int | None = None, device: str = AUTO
) -> quantized_pipeline.Quantized:
    """Make a packed model fit `steps` sampling steps of its pipeline's own scheduler.

    Cached temporal features are computed again by the float layers that `keep_temporal` left in the
    checkpoint. Input ranges and corrections are those of the nearest calibrated timestep.

    Args:
        target: a folder that lowtide wrote, a packed pipeline, or what `lowtide.quantize` returned;
            the latter two are changed in place.
        steps: sampling steps of the new schedule.
        size: height and width of the images, for schedulers whose timesteps depend on it.
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
    request = sampling.Request(steps, labels=labels, size=size)
    model = sampling.denoiser(pipe)
    _check(plan, steps)
    adapter = facts.float_adapter(model, plan) if plan.cached else None
    change = _change(plan, steps, _visited(pipe, request, plan))
    features = _float_features(model, adapter, change) if adapter else {}
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
    """Something depends on the step, and the float layers that are needed are there."""
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
            f"found {len(alone)} cached temporal features without the float layers "
            f"that they came from (first: {alone[0]})",
            "a checkpoint that kept them",
            f"quantize again with --keep-temporal, or with --steps {steps}",
        )


def _visited(pipe: Pipeline, request: sampling.Request, plan: Plan) -> dict[int, Tensor]:
    """The timesteps of one image by integer key, as the denoiser receives them, in order."""
    timesteps: dict[int, Tensor] = {}
    with _answering_at_any_time(sampling.denoiser(pipe), plan):
        for moment in sampling.trajectory(pipe, request):
            timesteps.setdefault(round(float(moment.t[0]) * plan.ticks), moment.t[0])
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
        reschedule_requests(model, plan)


def _change(plan: Plan, steps: int, visited: dict[int, Tensor]) -> Change:
    """The plan with the new timesteps, and where their tables come from."""
    after = replace(
        plan,
        timesteps=tuple(visited),
        times=tuple(float(time) for time in visited.values()),
        summary=plan.summary | {"steps": steps},
    )
    return Change(plan, after, tuple(visited.values()), nearest(plan.timesteps, after.timesteps))


def nearest(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """For each new timestep the index of the nearest old one: (new,)."""
    return (torch.tensor(new)[:, None] - torch.tensor(old)[None]).abs().argmin(1)


@torch.no_grad()
def _float_features(model: nn.Module, adapter: Adapter, change: Change) -> dict[str, Tensor]:
    """Every cached feature at the new timesteps, from the kept float layers: (T, width) each."""
    rows = [{"timestep": time} for time in change.visited]
    features: dict[str, Tensor] = {}
    for unit in adapter.temporal():
        if not change.before.cached.keys() & set(unit.features):
            continue
        caches = [cast(Cached, model.get_submodule(name)) for name in unit.features]
        for cache in caches:
            cache.set_precision(Precision.FLOAT)
        values = TemporalFeatures(adapter, unit, rows)(model)
        features |= dict(zip(unit.features, values, strict=True))
        for cache in caches:
            cache.set_precision(Precision.FULL)
    return features


def _update_tables(model: nn.Module, change: Change, features: dict[str, Tensor]) -> None:
    """Replace every table that is keyed by timestep."""
    per_step = change.before.per_step
    find_clock(model).reschedule(change.after.timesteps, change.nearest, per_step=per_step)
    if change.before.corrected:
        cast(Correction, model.get_submodule(CORRECTION)).reschedule(change.nearest)
    for name, feature in features.items():
        cast(Cached, model.get_submodule(name)).take(feature)
    reschedule_requests(model, change.after, change.nearest)


def _report(model: nn.Module, change: Change, features: dict[str, Tensor]) -> dict[str, object]:
    return {
        "from": change.before.summary["steps"],
        "features": len(features),
        "farthest": change.farthest,
        "timesteps": list(change.after.timesteps),
        "account": file_format.account(model),
    }


def reschedule_to_folder(
    source: str | Path, out: str | Path, steps: int, device: str = AUTO
) -> dict[str, object]:
    """Load, reschedule, save. The record is copied, so that the result can be evaluated."""
    out = Path(out)
    folders.recover_missing(source)
    home = sampling.local_folder(source)
    with folders.written_beside(out, source=home) as fresh:
        record = provenance.read(home)
        size = record.settings.get("size") if record else None
        result = reschedule(source, steps, size=size, device=device)
        result.write(fresh)
        report: dict[str, object] = {
            "model": str(source),
            "folder": str(out),
            "method": result.plan.method,
            "on_disk": facts.on_disk(fresh),
        }
        report |= result.plan.summary | result.report
        if record:
            _rescheduled(record, steps, report).write(fresh)
    return report


def _rescheduled(
    record: provenance.Provenance, steps: int, report: dict[str, object]
) -> provenance.Provenance:
    """The record of the calibrated model, with the new number of steps and this report."""
    return replace(
        record,
        command=provenance.command(),
        settings=record.settings | {"steps": steps},
        report=record.report | {"rescheduled": report},
    )
