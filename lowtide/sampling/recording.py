"""The trajectory: the pipeline's own sampler, listened to at the denoiser's door.

Calibration, sampling and evaluation all read this one loop. It runs the pipeline's own `__call__`, so that scheduler,
guidance and text encoders are exactly the user's; each image has a random generator of its own, so that image k depends on
seed k alone, whatever the batch.
"""

import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from inspect import signature
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.sampling.drivers import call_arguments, denoiser
from lowtide.sampling.pipelines import ModulePipeline, takes_generator
from lowtide.sampling.request import Moment, Request
from lowtide.sampling.variance_calibration import absorbing, stepping


@contextmanager
def own_noise(scheduler: Any, generators: list[torch.Generator]) -> Iterator[None]:
    """LDM, DiT, SD3 and Flux give a scheduler that adds noise no generator: here each image gets its own."""
    step = scheduler.step

    @wraps(step)
    def seeded(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> Any:
        # DiT steps both halves of a guided batch and keeps the first.
        options.setdefault("generator", generators * (len(sample) // len(generators)))
        return step(model_output, timestep, sample, *args, **options)

    if not takes_generator(scheduler):
        yield
        return
    with stepping(scheduler, seeded):
        yield


def run_pipeline(pipe: Any, request: Request) -> np.ndarray:
    """One batch of images, in [0, 1], channels last."""
    arguments = call_arguments(pipe, request)
    quiet = getattr(pipe, "set_progress_bar_config", None)
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    if quiet:
        quiet(disable=True)
    try:
        with (
            torch.no_grad(),
            absorbing(pipe.scheduler, denoiser(pipe)),
            own_noise(pipe.scheduler, arguments["generator"]),
        ):
            images = pipe(**arguments).images
    finally:
        if quiet:
            pipe._progress_bar_config = before
    return np.asarray(images, dtype=np.float32)


def images(
    pipe: Any, request: Request, track: Callable = lambda batches, total: batches
) -> np.ndarray:
    """All images, N x height x width x channels.

    An image alone and in a batch agree to about 1e-6 (relative L2), not bit for bit: a matrix product of another size sums
    in another order.
    """
    if getattr(pipe, "safety_checker", None) is not None:
        warnings.warn(
            "this pipeline's safety checker may answer with black images, which spoils comparisons",
            stacklevel=2,
        )
    batches = list(request.batches())
    return np.concatenate([run_pipeline(pipe, batch) for batch in track(batches, len(batches))])


def trajectory(
    pipe: Any, request: Request, *, keep: Collection[int] | None = None
) -> Iterator[Moment]:
    """Every call of the denoiser (or those whose index is in `keep`), batch by batch; in memory is one batch's moments."""
    for batch in request.batches():
        heard: list[Moment] = []
        with listening(denoiser(pipe), heard, keep):
            run_pipeline(pipe, batch)
        yield from heard


@contextmanager
def listening(
    model: nn.Module, heard: list[Moment], keep: Collection[int] | None
) -> Iterator[None]:
    """Write down what goes in and out of the denoiser."""
    names, indices = tuple(signature(model.forward).parameters), count()

    def listen(module: nn.Module, args: tuple, kwargs: dict, result: Any) -> None:
        index = next(indices)
        if keep is None or index in keep:
            heard.append(moment(index, dict(zip(names, args, strict=False)) | kwargs, result))

    hook = model.register_forward_hook(listen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def timesteps(pipe: Any, request: Request) -> list[float]:
    """The value the denoiser sees at each call, in order: heard from one image, because solvers call as often as they like."""
    return [
        float(heard.t[0]) for heard in trajectory(pipe, replace(request, seeds=request.seeds[:1]))
    ]


def moment(index: int, arguments: dict[str, Any], result: Any) -> Moment:
    """What was heard, off the device; the timestep spelled out for each sample."""
    kept = {name: kept_value(value) for name, value in arguments.items() if value is not None}
    samples = len(next(iter(kept.values())))
    kept["timestep"] = torch.as_tensor(kept["timestep"]).reshape(-1).expand(samples).clone()
    eps = result if isinstance(result, Tensor) else result[0]
    return Moment(index, kept["timestep"], kept, kept_value(eps))


def kept_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: kept_value(part) for name, part in value.items()}
    return value


def example(pipe: Any) -> dict[str, Tensor] | None:
    """One call's inputs, for a denoiser that no architecture describes."""
    if not isinstance(pipe, ModulePipeline):
        return None
    return {"sample": torch.zeros(2, *pipe.shape), "timestep": torch.zeros(2)}
