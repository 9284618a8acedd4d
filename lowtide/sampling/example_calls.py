"""Example calls of a denoiser, to record its architecture from: its pipeline starts, and stops.

Where no Architecture describes the denoiser, its pipeline is called for one image and for two. Each
call ends before the denoiser computes anything.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.models import ARCHITECTURES, Adapter, Arguments, adapt
from lowtide.models.generic import recorded_architecture
from lowtide.models.named_inputs import flat_inputs
from lowtide.sampling.drivers import DRIVERS, check_forward, denoiser
from lowtide.sampling.pipelines import ModulePipeline, Pipeline
from lowtide.sampling.recording import bound_arguments, draw, whole_arguments
from lowtide.settings import Request

FLOW = 1000  # ticks of a timestep between 0 and 1


class _Stop(Exception):
    """The denoiser has been called."""


def pipeline_adapter(pipe: Pipeline, request: Request) -> Adapter:
    """The adapter of the pipeline's denoiser, from its class or from example calls."""
    model = denoiser(pipe)
    check_forward(model)
    check_no_image_adapter(model, "quantize")
    if isinstance(pipe, ModulePipeline):
        return adapt(model, pipe.example(2))
    listed = next((kind for kind in type(model).__mro__ if kind in ARCHITECTURES), None)
    if listed is not None and type(pipe).__name__ in DRIVERS and not request.call:
        return adapt(model)
    one = first_call(pipe, replace(request, seeds=request.seeds[:1]))
    two = first_call(pipe, replace(request, seeds=_two(request.seeds)))
    found = recorded_architecture(model, one, two)
    if listed is not None:
        written = ARCHITECTURES[listed]
        if flat_inputs(written.example(model, 2)).keys() == flat_inputs(two).keys():
            return adapt(model, two)
        return adapt(model, two, replace(found, blocks=written.blocks, ticks=written.ticks))
    # Models of flow matching may read their timestep between 0 and 1.
    ticks = FLOW if float(two["timestep"].max()) <= 1 else 1
    return adapt(model, two, replace(found, ticks=ticks))


def check_no_image_adapter(model: nn.Module, doing: str) -> None:
    """An IP-Adapter is loaded into a packed model, because its weights are in no saved folder."""
    kinds = {type(each).__name__ for each in getattr(model, "attn_processors", {}).values()}
    if any(kind.startswith("IPAdapter") for kind in kinds):
        raise BadInput(
            f"found a {type(model).__name__} with an IP-Adapter",
            "a model without one",
            f"call unload_ip_adapter(), {doing}, and load it into the packed pipeline",
        )


def _two(seeds: Sequence[int]) -> Sequence[int]:
    if len(seeds) > 1:
        return seeds[:2]
    first = seeds[0]
    return (first, first + 1)


def first_call(pipe: Pipeline, request: Request) -> Arguments:
    """The arguments of the denoiser's first call."""
    model = denoiser(pipe)
    found: list[Arguments] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(whole_arguments(bound_arguments(module, args, kwargs)))
        raise _Stop

    hook = model.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            draw(pipe, request, "latent")
    except _Stop:
        pass
    finally:
        hook.remove()
    if not found:
        raise BadInput(
            f"found that a {type(pipe).__name__} never calls its {type(model).__name__}",
            "a pipeline that calls it at each step",
            "check the arguments of its call",
        )
    return found[0]


def example_inputs(pipe: Pipeline) -> Arguments | None:
    """One call's inputs, for a bare module, which no Architecture describes."""
    return pipe.example(2) if isinstance(pipe, ModulePipeline) else None
