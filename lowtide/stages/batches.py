"""CalibrationBatches: random batches of the calibration set, over all timesteps, with targets.

Targets are the float model's answers. Some images are held out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models import Arguments, answer_of
from lowtide.models.named_inputs import flat_inputs, mapped_inputs
from lowtide.nn.layer_call import on_input
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.base import Job
from lowtide.stages.collect import calibration_request
from lowtide.stages.fit_ranges import run_call
from lowtide.stages.held_out import HELD_OUT

Place = tuple[int, int]  # a sample: the number of its call, and its row there


class CalibrationBatches:
    """Batches of samples of the recorded calls.

    The last eighth of the images is held out, at all its steps and guidance branches.
    """

    def __init__(self, job: Job):
        self.job = job
        self.calls = job.calls
        self.rows = len(job.calls[0].arguments["timestep"])
        request = calibration_request(job)
        self.images = request.batch
        self.length = len(job.calls) // (len(request.seeds) // request.batch)
        places: list[Place] = []
        for call in range(len(self.calls)):
            places += [(call, row) for row in range(self.rows)]
        first_held_out = len(request.seeds) - max(1, len(request.seeds) // HELD_OUT)
        self.held_out = [place for place in places if self.image(place) >= first_held_out]
        self.training = [place for place in places if self.image(place) < first_held_out] or places
        self.answers = _float_answers(job)

    def image(self, place: Place) -> int:
        """The number of the calibration image that a sample shows.

        In a call, the guidance branches follow each other, each with all its images.
        """
        call, row = place
        return call // self.length * self.images + row % self.images

    def draw(self, places: list[Place], generator: torch.Generator) -> list[Place]:
        """A random batch of these samples, for all ranks together."""
        size = min(self.job.batch, len(places))
        numbers = torch.randint(len(places), (size,), generator=generator).tolist()
        return [places[number] for number in numbers]

    def windows(self, generator: torch.Generator, steps: int = 2) -> list[Place]:
        """A share of a batch of samples, then the same images one step later, for all `steps`."""
        last = self.length - steps
        starts = [(call, row) for call, row in self.training if call % self.length <= last]
        if not starts:
            raise BadInput(
                "found one step" if self.length == 1 else f"found {self.length} steps",
                f"at least {steps}, to compare consecutive ones",
                "give a larger --steps",
            )
        first = self.draw(starts, generator)[: max(1, self.job.batch // steps)]
        window: list[Place] = []
        for later in range(steps):
            window += [(call + later, row) for call, row in first]
        return window

    def arguments(self, batch: Sequence[Place]) -> Arguments:
        """These samples as one call of the denoiser."""
        whole = [self.calls[call].arguments for call, _ in batch]
        rows = [row for _, row in batch]
        architecture = self.job.adapter.architecture
        values = [flat_inputs(arguments) for arguments in whole]

        def joined(name: str, first: Tensor) -> Tensor:
            """The rows of each sample; a value without a batch axis is the same for all."""
            each = architecture.rows(name, first, self.rows)
            if not each:
                return first
            parts = [
                value[name][row * each : (row + 1) * each]
                for value, row in zip(values, rows, strict=True)
            ]
            return torch.cat(parts)

        return self.job.on_device(mapped_inputs(whole[0], joined))

    def targets(self, batch: Sequence[Place]) -> Tensor:
        """The float model's answers to these samples."""
        return self.job.on_device(torch.stack([self.answers[call][row] for call, row in batch]))


@torch.no_grad()
def _float_answers(job: Job) -> list[Tensor]:
    """The float model's answer to every recorded call; each rank runs its part of them."""
    set_precision(job.model, Precision.FLOAT)
    own = job.track(job.world.part(job.calls), "float answers")
    return job.world.gathered([answer_of(run_call(job, call)).cpu() for call in own])


@contextmanager
def last_features(job: Job) -> Iterator[list[Tensor]]:
    """Record the last layer's inputs inside this context, as samples x channels x positions."""
    last = job.model.get_submodule(job.adapter.ends()[1])
    inputs: list[Tensor] = []

    def record(module: nn.Module, x: Tensor) -> None:
        channels_second = x.movedim(-1, 1) if isinstance(module, nn.Linear) else x
        inputs.append(channels_second.flatten(2))

    hook = on_input(last, record)
    try:
        yield inputs
    finally:
        hook.remove()
