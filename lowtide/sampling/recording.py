"""Run the pipeline's own sampler and record every call of the denoiser: the trajectory.

Calibration, sampling and evaluation all read this one loop. It runs the pipeline's own `__call__`,
so scheduler, guidance and text encoders are exactly the user's. Each image has its own random
generator, so image k depends on seed k alone, whatever the batch size.
"""

# diffusers imports its classes lazily and does not declare them as exports.
# pyright: reportPrivateImportUsage=false

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, wraps
from inspect import signature
from itertools import count
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.machine.room import Room
from lowtide.models import Answer, Arguments, answer_of
from lowtide.models.named_inputs import mapped_inputs
from lowtide.report.progress import track
from lowtide.sampling.drivers import call_arguments, denoiser, gives_latents
from lowtide.sampling.pipelines import Pipeline, Scheduler, takes_generator
from lowtide.sampling.request import Moment, joined_moments
from lowtide.sampling.schedulers import scheduled
from lowtide.sampling.variance_calibration import calibrated_variance, stepping
from lowtide.settings import Request


@contextmanager
def _own_noise(scheduler: Scheduler, generators: list[torch.Generator]) -> Iterator[None]:
    """Pass each image's generator to a scheduler that adds noise.

    The pipelines of LDM, DiT, SD3 and Flux pass their scheduler no generator.
    """
    if not takes_generator(scheduler):
        yield
        return
    step = scheduler.step

    @wraps(step)
    def seeded(
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *args: object,
        **options: object,
    ) -> object:
        # DiT steps both halves of a guided batch and keeps the first.
        options.setdefault("generator", generators * (len(sample) // len(generators)))
        return step(model_output, timestep, sample, *args, **options)

    with stepping(scheduler, seeded):
        yield


@contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar, if it has one."""
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before


def run_pipeline(pipe: Pipeline, request: Request, room: Room | None = None) -> np.ndarray:
    """One batch of images: (batch, height, width, channels), in [0, 1].

    Where memory is short, the batch is drawn in parts. A seed belongs to its image, so the images
    are the same. `room` remembers the part that fits.
    """
    parts = _room_for(pipe, room).each(
        len(request.seeds), lambda span: draw(pipe, _part(request, span), output="np")
    )
    return np.concatenate(parts)


def _room_for(pipe: Pipeline, room: Room | None) -> Room:
    return room or Room(next(denoiser(pipe).parameters()).device)


def _part(request: Request, span: slice) -> Request:
    return replace(request, seeds=request.seeds[span])


def draw(pipe: Pipeline, request: Request, output: str) -> np.ndarray:
    """One part of a batch; `output` "latent" leaves out the decoder."""
    pipe = scheduled(pipe, request.scheduler, request.spacing)
    arguments = call_arguments(pipe, request)
    arguments["output_type"] = output
    with (
        _without_progress_bar(pipe),
        torch.no_grad(),
        calibrated_variance(pipe.scheduler, denoiser(pipe)),
        _own_noise(pipe.scheduler, arguments["generator"]),
    ):
        images = pictures_in(answer_to(pipe, arguments))
    if isinstance(images, Tensor):
        images = images.float().cpu()
    return np.asarray(images, dtype=np.float32)


@contextmanager
def one_sentence(pipe: Pipeline) -> Iterator[None]:
    """What a pipeline says against its arguments, as a BadInput."""
    try:
        yield
    except BadInput:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BadInput(
            f"found that a {type(pipe).__name__} fails on its arguments ({lines[0][:300]})",
            "those that it needs",
            "give or correct them with call={...} or --call FILE",
        ) from error


def answer_to(pipe: Pipeline, arguments: Arguments) -> Any:
    with one_sentence(pipe):
        return pipe(**arguments)


def pictures_in(answer: Any) -> Any:
    """The images of a pipeline's answer; the frames of a video."""
    names = ("images", "frames")
    found = next((name for name in names if getattr(answer, name, None) is not None), None)
    if found is None:
        raise BadInput(
            f"found a {type(answer).__name__} as the pipeline's answer",
            "one with images or frames",
            "choose another pipeline",
        )
    return getattr(answer, found)


def images(
    pipe: DiffusionPipeline | Pipeline,
    request: Request,
    *,
    show_progress: bool = False,
) -> np.ndarray:
    """All images of a request: (images, height, width, channels), in [0, 1].

    An image alone and in a batch agree to about 1e-6 (relative L2), not bit for bit: a matrix
    product of another size sums in another order. Under torchrun all processes call this alike,
    each draws its part of the batches, and all get all images.
    """
    return images_by_batch(pipe, request, run_pipeline, show_progress=show_progress)


def images_by_batch(
    pipe: DiffusionPipeline | Pipeline,
    request: Request,
    draw_batch: Callable[[Pipeline, Request, Room], np.ndarray],
    *,
    show_progress: bool,
) -> np.ndarray:
    """All images of a request, of which `draw_batch` draws each batch, or has drawn it before."""
    if isinstance(pipe, str | Path):
        raise BadInput(f"found the name {pipe}", "a pipeline", f"pass lowtide.load({str(pipe)!r})")
    pipe = cast(Pipeline, pipe)
    if getattr(pipe, "safety_checker", None) is not None:
        warnings.warn(
            "this pipeline's safety checker may answer with black images, which spoils comparisons",
            stacklevel=3,
        )
    world = join()
    batches = world.part(list(request.batches()))
    shown = track(batches, total=len(batches), title="sampling") if show_progress else batches
    room = _room_for(pipe, None)
    return np.concatenate(world.gathered([draw_batch(pipe, batch, room) for batch in shown]))


def trajectory(
    pipe: Pipeline,
    request: Request,
    *,
    keep: Collection[int] | None = None,
    room: Room | None = None,
) -> Iterator[Moment]:
    """Every call of the denoiser, or those whose index is in `keep`, batch by batch.

    Only one batch's calls are in memory at a time. Where the device is short of memory, a batch is
    drawn in parts, and their calls are joined. A decoder of latents has nothing to do here.
    """
    room = _room_for(pipe, room)
    output = "latent" if gives_latents(pipe) else "np"

    def record(batch: Request, span: slice) -> list[Moment]:
        moments: list[Moment] = []
        with record_calls(denoiser(pipe), moments, keep):
            draw(pipe, _part(batch, span), output)
        return moments

    for batch in request.batches():
        parts = room.each(len(batch.seeds), partial(record, batch))
        sizes = [len(batch.seeds[span]) for span in room.spans(len(batch.seeds))]
        yield from (joined_moments(calls, sizes) for calls in zip(*parts, strict=True))


@contextmanager
def record_calls(
    model: nn.Module, moments: list[Moment], keep: Collection[int] | None
) -> Iterator[None]:
    """Append the denoiser's calls to `moments`: all, or those whose index is in `keep`."""
    indices = count()

    def record(module: nn.Module, args: tuple, kwargs: dict, result: Answer) -> None:
        index = next(indices)
        if keep is None or index in keep:
            moments.append(_moment(index, bound_arguments(model, args, kwargs), result))

    hook = model.register_forward_hook(record, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def timesteps(pipe: Pipeline, request: Request) -> list[float]:
    """The timestep of each call of the denoiser, in order.

    It is recorded while one image is drawn, because a solver may call the denoiser more than once
    a step.
    """
    one_image = replace(request, seeds=request.seeds[:1])
    return [float(moment.t[0]) for moment in trajectory(pipe, one_image)]


def _moment(index: int, arguments: Arguments, result: Answer) -> Moment:
    """The call on the CPU, with one timestep for each sample."""
    copies = whole_arguments(arguments)
    return Moment(index, copies["timestep"], copies, _on_cpu("", answer_of(result)))


def bound_arguments(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call by name, without those that are None and can be left out."""
    parameters = signature(model.forward).parameters
    named = dict(zip(parameters, args, strict=False)) | kwargs
    needed = {name for name, each in parameters.items() if each.default is each.empty}
    return {name: value for name, value in named.items() if value is not None or name in needed}


def whole_arguments(arguments: Arguments) -> Arguments:
    """A copy of a call's arguments on the CPU, with one timestep for each sample."""
    copies = mapped_inputs(arguments, _on_cpu)
    first = next(iter(copies.values()))
    timestep = torch.as_tensor(copies.get("timestep", ())).reshape(-1)
    if not isinstance(first, Tensor) or len(timestep) not in (1, len(first)):
        raise BadInput(
            f"found a denoiser that is called with {', '.join(copies)}",
            "one tensor of samples, and one timestep for each",
            "quantize without data: see LowtideConfig in docs/guides/diffusers.md",
        )
    return copies | {"timestep": timestep.expand(len(first)).clone()}


def _on_cpu(name: str, tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
