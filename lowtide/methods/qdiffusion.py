"""Q-Diffusion: quantizing diffusion models (Li et al., ICCV 2023, arXiv 2302.04304).

Inputs drift with the timestep, so the calibration set holds a few images at evenly spaced steps of
the float model's own trajectory. In the up blocks of a UNet, a shortcut reads two concatenated
tensors, one of them directly from the down blocks, and their ranges and weights differ widely:
each half is quantized on its own. Then rounding is learnt block by block, and after it the scales
of the inputs.

    calibration set: x_t of every (T / c)-th step    stages.collect, `calibration_steps`, all images
    shortcut-splitting, X1 W1 + X2 W2                class Split over adapter.concatenations()
    weights: AdaRound, block by block (BRECQ)        Reconstruct; temporal layers with their blocks
    inputs: LSQ of the scales, zero points fixed     LearnRanges(temporal=True)
    one range for all timesteps                      Assign()

Departs from the paper: profile `full` keeps the weights of the first and the last layer at 8 bits
and their inputs in float; in profile `paper` (qdiffusion) they have the nominal bits, as in the
released code, and the softmax has 8, or 16 in models of text. Weight ranges are searched by mse for
every model; the paper takes the maximum for CIFAR. Adam's rate grows as iterations shrink
(stages.reconstruct.rate). Ranges are learnt for `range_iters` iterations, 100 by default,
with the squared error, and Adam at 1e-2 on the logarithm of each scale. The paper takes 5,000
iterations, p = 2.4 and a rate of 4e-4 that falls along a cosine.

Departs from the released code: the code's rounding penalty misses the second half of a split
shortcut, so that half is rounded although its rounding was never decided. Here both halves are
ordinary layers. The softmax has an unsigned format everywhere.
"""

from dataclasses import dataclass

from lowtide.costs import Cost, Workload
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import RANGE_ITERS, LearnRanges
from lowtide.stages.model_edits import split_layers
from lowtide.stages.pack import Pack
from lowtide.stages.profiles import Bits
from lowtide.stages.reconstruct import Reconstruct


@dataclass(frozen=True)
class Split(Stage):
    """Shortcut-splitting: a shortcut over two concatenated tensors becomes a sum of two layers."""

    def run(self, job: Job) -> None:
        if _quantizes_shortcuts(job):
            widths = job.adapter.concatenations()
            shortcuts = [name for name in job.adapter.shortcuts() if name in widths]
            if shortcuts:
                split_layers(job, {name: widths[name] for name in shortcuts})
        job.report["split"] = list(job.plan.splits)

    def cost(self, load: Workload) -> Cost:
        """Negligible."""
        return Cost()

    def predict_plan(self, job: Job) -> None:
        """The same as `run`: the plan depends on shapes alone."""
        self.run(job)


def _quantizes_shortcuts(job: Job) -> bool:
    """Whether the profile and the bits leave anything of a shortcut to quantize."""
    bits = Bits(job.settings, job.role)
    return min(bits.weight("shortcuts"), bits.input("shortcuts")) <= 8


def recipe(settings: Settings) -> Recipe:
    return (
        Collect(),
        Split(),
        Assign(),
        FitWeights("mse"),
        Reconstruct(),
        FitRanges("mse"),
        LearnRanges(settings.range_iters or RANGE_ITERS, temporal=True),
        Pack(),
    )
