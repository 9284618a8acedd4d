"""Where a model lies while it is quantized: whole on the device, or block by block."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from lowtide.costs import Network, Speed, Workload
from lowtide.costs.card import BLOCKS, CONTEXT, WHOLE, CardWeights, StageBytes
from lowtide.costs.speed import Products
from lowtide.errors import BadInput
from lowtide.machine.device_names import AUTO
from lowtide.machine.devices import CPU, free_memory
from lowtide.machine.room import Room
from lowtide.nn.placement import Placement
from lowtide.report.wording import size
from lowtide.sampling import other_parts, parts_apart, supported_fields
from lowtide.stages.base import Job, Recipe

FEW = 4  # samples at once, with which the whole model has to fit if it is placed whole
_NO_TIME = Products(conv=0, conv_back=0, linear=0, linear_back=0)
TIMELESS = Speed(
    full=_NO_TIME, low=_NO_TIME, value=0, value_back=0, weight=0, search=0, call=0, call_back=0
)


@contextmanager
def on_the_device(job: Job, recipe: Recipe, device: torch.device, *, named: bool) -> Iterator[None]:
    """Within the context, the model computes on the device; afterwards it lies there, packed.

    named: the model was named by path, so its text encoders and decoder come to the device only
        while they are at work. A pipeline's owner has chosen their places, and they keep them.
    """
    place = chosen_place(job, recipe, device)
    blocks = job.adapter.movable_blocks() if place == BLOCKS else ()
    if named and not blocks:
        job.model.to(device)
    job.placement = Placement(job.model, device, blocks)
    job.room = Room(device, job.room.say)
    job.report["place"] = place
    if not named:
        yield
    else:
        with parts_apart(job.pipe, device):
            yield
    job.placement.end()


def chosen_place(job: Job, recipe: Recipe, device: torch.device) -> str:
    """What lies on the device: the settings' choice, or what fits into its free memory."""
    asked = job.settings.place
    if device == CPU:
        if asked == BLOCKS:
            raise BadInput(
                "found place 'blocks' on the CPU, where the whole model lies",
                "an accelerator",
                "leave --place away, or give --device cuda",
            )
        return WHOLE
    if asked != AUTO:
        return asked
    memory = free_memory(device)
    if memory is None:
        return WHOLE
    held = sum(each.nbytes for each in job.model.parameters() if each.device == device)
    free = memory[0] + held - CONTEXT // 4
    needed = peak_bytes(job, recipe, WHOLE)
    if needed <= free:
        return WHOLE
    job.console.print(
        f"place: blocks, because the whole model takes {size(round(needed))} on {device}, "
        f"where {size(free)} are free",
        soft_wrap=True,
        markup=False,
    )
    return BLOCKS


def peak_bytes(job: Job, recipe: Recipe, place: str) -> float:
    """The most bytes of this job on the device, with batches in parts if need be."""
    network = Network(job.adapter)
    width = next(job.model.parameters()).element_size()
    branches = 2 if "guidance" in supported_fields(job.pipe) else 1
    load = Workload(
        network, job.settings, TIMELESS, job.settings.steps, branches, width=width, apart=True
    )
    parts = other_parts(job.pipe).values()
    others = [sum(each.nbytes for each in part.parameters()) for part in parts]
    weights = CardWeights.of(network, width)
    stages = stage_bytes(recipe, in_parts(load), others)
    return max(weights.peak(place, stage) for stage in stages)


def in_parts(load: Workload) -> Workload:
    """The same work with a few samples at once, to which batches are cut where memory is short."""
    images = max(1, FEW // load.branches)
    settings = replace(
        load.settings,
        images=min(load.settings.calibration_batch, images),
        batch=min(load.settings.batch, FEW),
    )
    return replace(load, settings=settings)


def stage_bytes(recipe: Recipe, load: Workload, others: list[int]) -> list[StageBytes]:
    """The bytes on a card of each stage beside the denoiser's weights, then of the other parts."""
    stages: list[StageBytes] = []
    for stage in recipe:
        cost = stage.cost(load)
        stages.append(StageBytes(cost.bytes if cost else 0, stage.whole))
    return [*stages, StageBytes(max(others, default=0))]
