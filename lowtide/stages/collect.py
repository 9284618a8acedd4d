"""Collect: the calibration set, which is every call of the denoiser on one float trajectory."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.distributed.world import World
from lowtide.errors import BadInput
from lowtide.models import Arguments, adapt
from lowtide.sampling import Moment, Request, trajectory
from lowtide.settings import Settings
from lowtide.stages.base import Call, Job, Stage
from lowtide.stages.call_records import IndexedCall, calls_of, tensors_of

STAGE = "Collect"


@dataclass(frozen=True)
class Collect(Stage):
    """Record the denoiser's inputs at every step of the pipeline's own sampler.

    `settings.calibration_steps` of the steps, evenly spread, serve reconstruction.
    """

    essential: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset(
        {"steps", "images", "prompts", "labels", "guidance", "eta", "size", "pictures"}
        | {"scheduler", "spacing", "call"}
    )

    def run(self, job: Job) -> None:
        job.calls = sampled_calls(job, recorded=True)
        job.adapter = adapt(job.model, job.calls[0].arguments, job.adapter.architecture)
        job.report["timesteps"] = len({call.timestep for call in job.calls})

    def cost(self, load: Workload) -> Cost:
        """While a batch is drawn, every argument of all its calls is held, and every answer."""
        changing, whole = load.input_bytes
        held = 0 if load.apart else load.steps * load.batch * (whole + changing)
        return Cost(load.passes(load.calls), load.alive_bytes(load.batch) + held)

    def summary(self, job: Job) -> str:
        timesteps = job.report["timesteps"]
        return f"{len(job.calls)} calls of the denoiser recorded at {timesteps} timesteps"


def sampled_calls(job: Job, *, recorded: bool = False) -> list[Call]:
    """The calls of one trajectory of the model, at the precision that is set.

    Each rank draws its part of the batches. `recorded`: a resumed run takes up finished batches.
    """
    request = calibration_request(job)
    batches = job.world.part(list(request.batches()))
    drawn = _drawn(job, batches, recorded=recorded)
    calls = list(job.track(drawn, "collecting inputs", request.steps * len(batches)))
    marked = _mark_kept(job.world.gathered(calls), job.settings.calibration_steps)
    _check_finite(marked)
    return marked


def _drawn(job: Job, batches: Sequence[Request], *, recorded: bool) -> Iterator[IndexedCall]:
    """The calls of these batches, with the numbers of their steps."""
    own = job.changed(world=World())  # each rank keeps the batches that it draws
    arguments: Arguments = {}
    for batch in batches:
        name = f"images-from-{batch.seeds[0]}"
        known = own.recorded(STAGE, name) if recorded else None
        if known is not None:
            yield from calls_of(known)
            continue
        calls: list[IndexedCall] = []
        for moment in trajectory(job.pipe, batch, room=job.room):
            timestep = round(float(moment.t.flatten()[0]) * job.adapter.ticks)
            check_answer(moment)
            arguments = _share(moment.arguments, arguments)
            calls.append((moment.index, Call(timestep, arguments, kept=False)))
            yield calls[-1]
        tensors = tensors_of(calls) if recorded and job.folder else None
        if tensors is not None:
            own.record(STAGE, name, tensors)


def calibration_request(job: Job) -> Request:
    """The images of the calibration set."""
    return request_of(job.settings)


def request_of(settings: Settings) -> Request:
    """The images of the calibration set that these settings ask for.

    Their seeds are far from those a user samples with. All batches have one size, because graphs
    are recorded for one.
    """
    first = 1_000_000_007 * (settings.seed + 1)
    return Request(
        steps=settings.steps,
        seeds=tuple(range(first, first + settings.images)),
        prompts=settings.prompts,
        labels=settings.labels,
        guidance=settings.guidance,
        eta=settings.eta,
        size=settings.size,
        pictures=settings.pictures,
        call=settings.call,
        batch=settings.calibration_batch,
    )


def _share(arguments: Mapping[str, object], previous: Mapping[str, object]) -> Arguments:
    """The arguments; those equal to the previous step's (prompts, labels) are the same tensors."""
    return {name: _shared(value, previous.get(name)) for name, value in arguments.items()}


def _shared(value: object, previous: object) -> object:
    if isinstance(value, Tensor) and isinstance(previous, Tensor):
        alike = previous.shape == value.shape and torch.equal(previous, value)
        return previous if alike else value
    if isinstance(value, dict):
        return _share(value, previous if isinstance(previous, dict) else {})
    return value


def _mark_kept(calls: list[tuple[int, Call]], count: int) -> list[Call]:
    """Mark every call of `count` evenly spread steps as kept; calls come with their step."""
    steps = sorted({step for step, _ in calls})
    gaps = max(1, count - 1)
    places = [round(number * (len(steps) - 1) / gaps) for number in range(min(count, len(steps)))]
    kept = {steps[place] for place in places}
    return [replace(call, kept=step in kept) for step, call in calls]


def check_answer(moment: Moment) -> None:
    """The answer of every step is finite, that of the last one too."""
    if moment.eps.isfinite().all():
        return
    raise BadInput(
        f"found NaN or infinity in the model's answer at timestep {float(moment.t.flatten()[0]):g}",
        "a float model that samples finite images",
        _way_out(moment.eps.dtype),
    )


def _way_out(dtype: torch.dtype) -> str:
    """float16 ends at 65,504, which activations exceed in some models."""
    if dtype == torch.float16:
        return "use --dtype bfloat16, whose range is wider, or float32"
    return "check the model's weights and its scheduler"


def _check_finite(calls: list[Call]) -> None:
    for call in calls:
        for name, value in call.arguments.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                continue
            if not value.isfinite().all():
                raise BadInput(
                    f"found NaN or infinity in {name} at timestep {call.timestep}",
                    "a float model that samples finite images",
                    _way_out(value.dtype),
                )
