"""CalibrationBatches: random batches of the recorded calls, mixed over timesteps, with the float model's answers; some images held out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.base import Job
from lowtide.stages.collect import calibration_request
from lowtide.stages.fit_ranges import run_call

HELD_OUT = 8
Places = list[tuple[int, int]]


class CalibrationBatches:
    """Samples by place, (call, row). The last eighth of the images is held out, at all its steps and guidance branches."""

    def __init__(self, job: Job):
        self.job, self.calls = job, job.calls
        self.rows = len(job.calls[0].arguments["timestep"])
        request = calibration_request(job)
        self.images = request.batch
        self.length = len(job.calls) // (len(request.seeds) // request.batch)
        places = [(call, row) for call in range(len(self.calls)) for row in range(self.rows)]
        first_held = len(request.seeds) - max(1, len(request.seeds) // HELD_OUT)
        self.held_out = [place for place in places if self.image(place) >= first_held]
        self.taught = [place for place in places if self.image(place) < first_held] or places
        self.starts = [
            (call, row) for call, row in self.taught if call % self.length < self.length - 1
        ]
        self.answers = float_answers(job)

    def image(self, place: tuple[int, int]) -> int:
        """Which image a place belongs to. Guidance branches follow each other in a call, each with all its images."""
        call, row = place
        return call // self.length * self.images + row % self.images

    def some(self, places: Places, generator: torch.Generator) -> Places:
        size = min(self.job.settings.batch, len(places))
        return [
            places[number]
            for number in torch.randint(len(places), (size,), generator=generator).tolist()
        ]

    def pairs(self, generator: torch.Generator) -> Places:
        """Half a batch of samples, then the same images one step later."""
        if not self.starts:
            raise BadInput(
                "found one step",
                "at least two, to compare consecutive ones",
                "give a larger --steps",
            )
        chosen = self.some(self.starts, generator)[: max(1, self.job.settings.batch // 2)]
        return chosen + [(call + 1, row) for call, row in chosen]

    def arguments(self, chosen: Places) -> dict[str, Any]:
        """These samples as one call of the denoiser."""
        whole, rows = [self.calls[call].arguments for call, _ in chosen], [row for _, row in chosen]
        shared, given = self.job.adapter.architecture.shared, dict(whole[0])
        for name in given.keys() - set(shared):
            given[name] = self.joined([arguments[name] for arguments in whole], rows)
        return self.job.on_device(given)

    def joined(self, values: list[Any], rows: list[int]) -> Any:
        """One row of each value; what has no batch axis is the same for all."""
        first = values[0]
        if isinstance(first, Mapping):
            return {name: self.joined([value[name] for value in values], rows) for name in first}
        if isinstance(first, Tensor) and first.dim() and len(first) == self.rows:
            return torch.stack([value[row] for value, row in zip(values, rows, strict=True)])
        return first

    def targets(self, chosen: Places) -> Tensor:
        return self.job.on_device(torch.stack([self.answers[call][row] for call, row in chosen]))


@torch.no_grad()
def float_answers(job: Job) -> list[Tensor]:
    """What the float model says to every recorded call."""
    set_precision(job.model, Precision.FLOAT)
    return [answer_of(run_call(job, call)).cpu() for call in job.track(job.calls, "float answers")]


def answer_of(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@contextmanager
def features(job: Job) -> Iterator[list[Tensor]]:
    """What reaches the last layer while the block runs, as samples x channels x positions."""
    last = job.model.get_submodule(job.adapter.ends()[1])
    heard: list[Tensor] = []

    def note(module: nn.Module, args: tuple) -> None:
        x = args[0]
        heard.append(x.movedim(-1, 1).flatten(2) if isinstance(module, nn.Linear) else x.flatten(2))

    hook = last.register_forward_pre_hook(note)
    try:
        yield heard
    finally:
        hook.remove()
