"""Collect: one float trajectory through the pipeline's own sampler; every call's inputs are kept, marked steps for weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.errors import BadInput
from lowtide.models import adapt
from lowtide.sampling import Request, trajectory
from lowtide.stages.base import Call, Job, Stage


@dataclass(frozen=True)
class Collect(Stage):
    """Record the denoiser's inputs at every step; `settings.calibration_steps` of the steps, evenly spread, serve reconstruction."""

    essential: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset(
        {"steps", "images", "prompts", "labels", "guidance", "eta", "size"}
    )

    def run(self, job: Job) -> None:
        job.calls = sampled_calls(job)
        job.adapter = adapt(job.model, job.calls[0].arguments)
        job.report["timesteps"] = len({call.timestep for call in job.calls})

    def cost(self, load: Workload) -> Cost:
        """While a batch is drawn, every argument of all its calls is held, and every answer."""
        changing, whole = load.input_bytes
        held = load.steps * load.batch * (whole + changing)
        return Cost(load.passes(load.calls), load.alive_bytes(load.batch) + held)


def sampled_calls(job: Job) -> list[Call]:
    """One trajectory of the model as it is now: float at first, or, for papers that ask, quantized."""
    request = calibration_request(job)
    moments = trajectory(job.pipe, request)
    total = request.steps * -(-len(request.seeds) // request.batch)
    calls, previous = [], {}
    for moment in job.track(moments, "collecting inputs", total):
        timestep = round(float(moment.t.flatten()[0]) * job.adapter.ticks)
        arguments = previous = share(moment.arguments, previous)
        calls.append((moment.index, Call(timestep, arguments, False)))
    kept = keep_some(calls, job.settings.calibration_steps)
    check_finite(kept)
    return kept


def calibration_request(job: Job) -> Request:
    """Seeds of their own, far from those a user samples with; batches of one size, because graphs are recorded for one."""
    settings = job.settings
    first = 1_000_000_007 * (settings.seed + 1)
    return Request(
        steps=settings.steps,
        seeds=tuple(range(first, first + settings.images)),
        prompts=settings.prompts,
        labels=settings.labels,
        guidance=settings.guidance,
        eta=settings.eta,
        size=settings.size,
        batch=settings.calibration_batch,
    )


def share(arguments: dict[str, Any], previous: dict[str, Any]) -> dict[str, Any]:
    """Arguments that did not change since the last step (prompts, labels) are kept once."""
    return {name: shared(value, previous.get(name)) for name, value in arguments.items()}


def shared(value: Any, before: Any) -> Any:
    if isinstance(value, Tensor):
        same = (
            isinstance(before, Tensor)
            and before.shape == value.shape
            and torch.equal(before, value)
        )
        return before if same else value
    if isinstance(value, dict):
        return share(value, before if isinstance(before, dict) else {})
    return value


def keep_some(calls: list[tuple[int, Call]], kept: int) -> list[Call]:
    """Mark every call of `kept` evenly spread steps."""
    indices = sorted({index for index, _ in calls})
    spread = {
        indices[round(place * (len(indices) - 1) / max(1, kept - 1))]
        for place in range(min(kept, len(indices)))
    }
    return [Call(call.timestep, call.arguments, index in spread) for index, call in calls]


def check_finite(calls: list[Call]) -> None:
    for call in calls:
        for name, value in call.arguments.items():
            if (
                isinstance(value, Tensor)
                and value.is_floating_point()
                and not value.isfinite().all()
            ):
                raise BadInput(
                    f"found NaN or infinity in {name} at timestep {call.timestep}",
                    "a float model that samples finite images",
                    "check the model's weights and its scheduler, or load it in float32",
                )
