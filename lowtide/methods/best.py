"""best, the default: stages of several papers, chosen by what measured best at each width.

docs/results.md has the measurements. Each stage can be left out (`--without omq`) to measure what
it contributes. This is the one file of this folder that imports papers.

    heavy channels of inputs and weights      OMQ of MPQ-DM. TCR of TCAQ-DM gains no more, and
                                              leaves linear layers alone
    temporal features                         TIAR and FSC of TFMQ-DM; the feature cache of
                                              Temporal Feature Matters
    the rest of the weights                   Reconstruct, block by block
    inputs of at most 6 bits                  ranges learnt block by block (LSQ)
    inputs of at most 4 bits                  also DAQ of TCAQ-DM, by error; ranges are searched by
                                              mse, so that their ends may be clipped
    weights of at most 3 bits or              Distill of EfficientDM, starting from the
    inputs of at most 4 bits                  reconstructed blocks
    the mean error of the answer              Bias of PTQD: subtracted for each step and channel
"""

from lowtide.methods.mpq import OMQ
from lowtide.methods.ptqd import Bias
from lowtide.methods.tcaq import DAQ
from lowtide.methods.temporal_cache import Maintain
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Recipe
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR

# Weights of at most so many bits gain from distilling the whole network after its blocks.
DISTILLED_WEIGHTS = 3
# Inputs of at most so many bits gain from learnt ranges.
LEARNT_INPUTS = 6
# Inputs of at most so many bits gain from distillation, from clipped ranges, and from log2 for some
# softmax outputs.
COARSE_INPUTS = 4


def recipe(settings: Settings) -> Recipe:
    coarse = settings.inputs <= COARSE_INPUTS
    learns_ranges = settings.inputs <= LEARNT_INPUTS or settings.range_iters > 0
    distills = coarse or settings.weights <= DISTILLED_WEIGHTS
    range_iters = settings.range_iters or max(1, settings.iters // 2)
    return (
        Collect(),
        Assign(per_step=True),
        OMQ(),
        FitWeights("mse"),
        TIAR(),
        Maintain(),
        Reconstruct(),
        FitRanges("mse" if coarse else "minmax"),
        *((DAQ(by="error"),) if coarse else ()),
        *((LearnRanges(iters=range_iters),) if learns_ranges else ()),
        *((Distill(),) if distills else ()),
        Bias(),
        Pack(),
    )
