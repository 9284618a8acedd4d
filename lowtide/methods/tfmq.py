"""TFMQ-DM: temporal feature maintenance (Huang et al., CVPR 2024, arXiv 2311.16503).

A denoiser learns what time it is through a small block that reads the timestep t and nothing else: the time embedding
h(t) and, in every residual block i, a layer g_i. Ordinary reconstruction rounds g_i for the sake of images from a small
calibration set, and gives its inputs one range for all t; the temporal feature g_i(h(t)) drifts until the network takes
one timestep for another. TFMQ rounds the whole block for its own features over all t, and keeps one input range per t.

    temporal information block      adapter.temporal()
    TIAR, weights of the block      stages.temporal.TIAR, which its journal extension shares
    the rest of the weights         stages.reconstruct.Reconstruct, block by block, asymmetric
    FSC, one range per timestep     class FSC; the ranges themselves are found by FitRanges

Without TIAR (`--without tiar`) the g_i are rounded with their blocks, which is what the paper measures it against.
Departs from the paper: where the block also reads a label or pooled text (DiT, SDXL, SD3, Flux) its inputs are the (t,
condition) pairs of the calibration calls, not t alone. TIAR runs longer than a block's reconstruction. Adam's rate grows
as iterations shrink (stages.reconstruct.rate). Ranges are plain min-max over the calibration calls; on a finite set the
paper found every estimator equal.
Departs from the released code: TIAR sees all T timesteps, not a tenth of them; the first temporal layer and the inputs of
the block are quantized too (profile `full`); dropout is off; attention's q, k, v and softmax really are quantized.
"""

from dataclasses import dataclass

from lowtide.costs import Cost, Workload
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import range_each_step
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.tiar import TIAR


@dataclass(frozen=True)
class FSC(Stage):
    """Finite set calibration: the inputs of a layer at step t form a small set of their own; give it its own range."""

    def run(self, job: Job) -> None:
        range_each_step(job)

    def cost(self, load: Workload) -> Cost:
        """Next to nothing."""
        return Cost()

    def foresee(self, job: Job) -> None:
        """The plan depends on shapes alone."""
        self.run(job)


def recipe(settings: Settings) -> Recipe:
    learnt = (LearnRanges(),) if settings.range_iters else ()
    start = (Collect(), Assign(), FSC(), FitWeights("mse"), TIAR(), Reconstruct())
    return (*start, FitRanges("minmax"), *learnt, Pack())
