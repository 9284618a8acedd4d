"""PTQ4DM: post-training quantization on diffusion models (Shang et al., CVPR 2023, arXiv 2211.15736).

What a denoiser reads changes along the way from noise to image, so calibrating on one timestep, or on images, misleads. PTQ4DM
calibrates on inputs that the float model itself makes on the way from noise, at timesteps drawn from a normal distribution
that leans towards the image. Scales then minimise the error of the values in the Lp norm, p = 2.4; nothing is learnt.

    NDTC, t_i ~ N(mu, T/2), mu <= T/2; floor, clamp to [0, T]        class NDTC; t counts from the image, in units of T
    x_{t_i}: denoise from noise with the float model                 stages.collect, one trajectory; the calls at t_i serve
    scales by || X - X^ ||_p, p = 2.4                                FitWeights("mse"), FitRanges("mse")

Departs from the paper: a draw takes a batch of images at one step, not one image; `kept` draws for each batch, with repeats, so
that an often drawn step weighs more. mu, which the paper bounds, is 0.4 T as in its code. T/2 is read as a standard deviation.
Profile `full` also quantizes attention's q, k, v and softmax, and keeps the first and the last layer's weights at 8 bits.
Departs from the released code: its time labels are reversed (a sample at noise level T - 2 - i is calibrated as timestep i), here
each input keeps the timestep it was recorded with. Its N(0.4 T, 0.4 T) is NDTC(std=0.4). Formats bend to lopsided ranges where
its are symmetric, and QDrop, which its flags mention and its scripts never reach, is left out.
"""

from collections import Counter
from dataclasses import dataclass, replace

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
    """Normally distributed time calibration: from here on, only recorded calls at drawn timesteps serve."""

    mean: float = 0.4
    std: Positive = 0.5

    def run(self, job: Job) -> None:
        recorded: dict[int, list[Call]] = {}
        for call in job.calls:
            recorded.setdefault(call.timestep, []).append(call)
        # A solver may call a timestep twice (Heun, PNDM): one that is called once tells how many batches there are.
        timesteps, batches = sorted(recorded), min(len(calls) for calls in recorded.values())
        drawn = self.draw(
            job.settings.calibration_steps * batches, len(timesteps), job.generator("NDTC")
        ).tolist()
        chosen = [(place, recorded[timesteps[t]]) for place, t in enumerate(drawn)]
        job.calls = [replace(calls[place % len(calls)], kept=True) for place, calls in chosen]
        job.report["ndtc"] = dict(sorted(Counter(call.timestep for call in job.calls).items()))

    def draw(self, count: int, steps: int, generator: torch.Generator) -> Tensor:
        """So many t_i, as places on a schedule of `steps` that begins at the image."""
        normal = self.mean + self.std * torch.randn(count, generator=generator)
        return (normal * steps).floor().long().clamp(0, steps - 1)

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()


def recipe(settings: Settings) -> Recipe:
    return (Collect(), Assign(), NDTC(), FitWeights("mse"), FitRanges("mse"), Pack())
