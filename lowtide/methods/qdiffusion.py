"""Q-Diffusion: quantizing diffusion models (Li et al., ICCV 2023, arXiv 2302.04304).

Inputs drift with the timestep, so calibration takes a few images at every so many steps of the float model's own path. In a
UNet's up blocks the shortcut reads two tensors laid side by side, one of them come all the way from the down blocks, with
ranges and weights that are far apart: each half is quantized by itself. Then rounding is learnt block by block, and after it
the scales of the inputs.

    calibration set: x_t of every (T / c)-th step        stages.collect.Collect, `kept` steps of all images
    shortcut-splitting, X1 W1 + X2 W2                    class Split over adapter.concatenations()
    weights: AdaRound, block by block (BRECQ)            Reconstruct; nothing maintains g_i(h(t)): rounded with its block
    inputs: LSQ of the scales, zero points fixed         LearnRanges(temporal=True)
    one range for all timesteps                          Assign()

Departs from the paper: it keeps first and last layer at the nominal bits, our profile `full` their weights at 8 and their inputs
in float (and profile `paper`, which is another paper's choice, leaves the shortcuts in float, so that there is nothing to
split). Weight ranges are found by mse for every model, not by the maximum for CIFAR. Adam's rate grows as iterations shrink
(stages.reconstruct.rate). Ranges are learnt for `range_iters` iterations, 100 unless told, with the squared error and Adam's rate
at 1e-2 on the logarithm of each scale; the paper's are 5,000, with p = 2.4 and a rate of 4e-4 that falls along a cosine.
Departs from the released code: its rounding penalty forgets the second half of a split shortcut, which is then rounded though
it never decided; here halves are layers like any other. Softmax has an unsigned format everywhere, at the bits of inputs.
"""

from dataclasses import dataclass

from lowtide.costs import Cost, Workload
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import split_layers
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import RANGE_ITERS, LearnRanges, Reconstruct


@dataclass(frozen=True)
class Split(Stage):
    """Shortcut-splitting: a shortcut over two concatenated tensors becomes the sum of two layers."""

    def run(self, job: Job) -> None:
        joined = job.adapter.concatenations()
        widths = {name: joined[name] for name in job.adapter.shortcuts() if name in joined}
        if widths and self.serves(job.settings):
            split_layers(job, widths)
        job.report["split"] = list(job.plan.splits)

    def serves(self, settings: Settings) -> bool:
        """Whether shortcuts will be quantized at all."""
        return settings.profile == "full" and min(settings.weights, settings.inputs) <= 8

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()

    def foresee(self, job: Job) -> None:
        """The plan depends on shapes alone."""
        self.run(job)


def recipe(settings: Settings) -> Recipe:
    start = (Collect(), Split(), Assign(), FitWeights("mse"), Reconstruct(), FitRanges("mse"))
    return (*start, LearnRanges(settings.range_iters or RANGE_ITERS, temporal=True), Pack())
