"""PTQ4DM: post-training quantization for diffusion (Shang et al., CVPR 2023, arXiv 2211.15736).

The inputs of a denoiser change on the way from noise to image, so calibration on a single
timestep, or on images, misleads. PTQ4DM calibrates on inputs that the float model itself makes
while it denoises, at timesteps drawn from a normal distribution that leans towards the image. The
scales then minimise the error of the values in the Lp norm with p = 2.4; nothing is learnt.

    NDTC, t_i ~ N(mu, T/2), mu <= T/2,         class NDTC; t counts from the image, in units of T
    floor, clamp to [0, T]
    x_{t_i}: denoise with the float model      stages.collect: a trajectory; calls at t_i serve
    scales by || X - X^ ||_p, p = 2.4          FitWeights("mse"), FitRanges("mse")

Departs from the paper: one draw takes a batch of images at one timestep, not one image. There are
`calibration_steps` draws for each batch, with repeats, so that a timestep that is drawn often
weighs more. The paper only bounds mu; here it is 0.4 T, as in the released code. T/2 is read as a
standard deviation. Profile `full` also quantizes q, k, v and the softmax of attention, and keeps
the weights of the first and the last layer at 8 bits.

Departs from the released code: its time labels are reversed (a sample at noise level T - 2 - i is
calibrated as timestep i); here each input keeps the timestep at which it was recorded. The code's
N(0.4 T, 0.4 T) is NDTC(std=0.4). Formats here are asymmetric where the code's are symmetric. QDrop
is left out: the code's flags mention it and its scripts never reach it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack
from lowtide.validation import Positive


@dataclass(frozen=True)
class NDTC(Stage):
    """Normally distributed time calibration: later stages use only calls at drawn timesteps."""

    reads: ClassVar[frozenset[str]] = frozenset({"calibration_steps"})

    mean: float = 0.4
    std: Positive = 0.5

    def run(self, job: Job) -> None:
        recorded: dict[int, list[Call]] = {}
        for call in job.calls:
            recorded.setdefault(call.timestep, []).append(call)
        timesteps = sorted(recorded)
        # A solver may call a timestep twice per batch (Heun, PNDM), so the fewest calls of any
        # timestep are the number of batches.
        batches = min(len(calls) for calls in recorded.values())
        count = job.settings.calibration_steps * batches
        places = self.draw(count, len(timesteps), job.generator("NDTC")).tolist()
        job.calls = []
        for number, place in enumerate(places):
            calls = recorded[timesteps[place]]
            job.calls.append(replace(calls[number % len(calls)], kept=True))
        counts = Counter(call.timestep for call in job.calls)
        job.report["ndtc"] = dict(sorted(counts.items()))

    def draw(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """`count` draws of t_i as places on a schedule of `steps`; place 0 is next to the image."""
        normal = self.mean + self.std * torch.randn(count, generator=generator)
        return (normal * steps).floor().long().clamp(0, steps - 1)

    def cost(self, load: Workload) -> Cost:
        """Negligible."""
        return Cost()


def recipe(settings: Settings) -> Recipe:
    return (Collect(), Assign(), NDTC(), FitWeights("mse"), FitRanges("mse"), Pack())
