"""TFMQ-DM: temporal feature maintenance (Huang et al., CVPR 2024, arXiv 2311.16503).

A denoiser learns the timestep through a small block that reads the timestep t and nothing else:
the time embedding h(t) and, in every residual block i, an embedding layer g_i. Ordinary
reconstruction rounds g_i to fit images from a small calibration set, and gives its inputs one
range for all t; the temporal feature g_i(h(t)) then drifts until the network mistakes one timestep
for another. TFMQ rounds the whole block to keep its own features over all t, and keeps one input
range per t.

    temporal information block      adapter.temporal()
    TIAR, weights of the block      stages.tiar.TIAR, which the journal extension shares
    the rest of the weights         stages.reconstruct.Reconstruct, block by block: inputs from the
                                    quantized model, targets from the float one
    FSC, one range per timestep     class FSC (scope "temporal"); FitRanges then fits these ranges

Without TIAR (`--without tiar`) the g_i are rounded with their blocks. The paper compares TIAR with
this.

Departs from the paper: FSC gives every input of the network a range per timestep (scope "all"), as
the released code does; the paper's FSC is of the temporal block alone. docs/methods/tfmq.md
measures both. Where the block also reads a label or pooled text (DiT, SDXL, SD3, Flux),
its inputs are the (t, condition) pairs of the calibration calls, not t alone. TIAR runs for more
iterations than the reconstruction of a block. Adam's rate grows as iterations shrink
(stages.reconstruct.rate). Ranges are plain min-max over the calibration calls: the paper found all
range estimators equal on a finite set.

Departs from the released code: TIAR uses all T timesteps, not a tenth of them. The first temporal
layer and the inputs of the block are quantized too (profile `full`). Dropout is off. Attention's
q, k, v and softmax are really quantized.
"""

from dataclasses import dataclass
from itertools import chain
from typing import Literal

from lowtide.costs import Cost, Workload
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.model_edits import range_each_step
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR


@dataclass(frozen=True)
class FSC(Stage):
    """Finite set calibration: a layer's inputs at one step are a small set with its own range.

    scope: "temporal" is the temporal block alone; "all" is every layer and attention.
    """

    scope: Literal["all", "temporal"] = "all"

    def run(self, job: Job) -> None:
        if self.scope == "all":
            range_each_step(job)
            return
        layers = chain.from_iterable(unit.layers for unit in job.adapter.temporal())
        range_each_step(job, set(layers) & job.plan.layers.keys())

    def summary(self, job: Job) -> str:
        ranged = sum(each.per_step for each in job.plan.all_plans())
        return f"a range for each timestep, for {ranged} inputs"

    def cost(self, load: Workload) -> Cost:
        """Negligible."""
        return Cost()

    def predict_plan(self, job: Job) -> None:
        """The same as `run`: the plan depends on shapes alone."""
        self.run(job)


def recipe(settings: Settings) -> Recipe:
    learn_ranges = (LearnRanges(),) if settings.range_iters else ()
    return (
        Collect(),
        Assign(),
        FSC(),
        FitWeights("mse"),
        TIAR(),
        Reconstruct(),
        FitRanges("minmax"),
        *learn_ranges,
        Pack(),
    )
