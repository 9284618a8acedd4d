"""best, the default: stages of several papers, composed by what measured best at each width (docs/results.md).

    heavy channels of inputs and weights     OMQ          of MPQ-DM; TCR of TCAQ-DM gains no more, and leaves linear layers alone
    the sense of time                        TIAR, FSC    of TFMQ-DM; cached features of Temporal Feature Matters
    the rest of the weights                  Reconstruct, block by block
    inputs of fewer than 8 bits              ranges learnt block by block (LSQ); of 4 bits DAQ of TCAQ-DM, by error
    weights of 3 bits, inputs of 4, or fewer Distill of EfficientDM, from what the blocks have learnt
    what every image's answer has in common  Bias of PTQD: the mean error of each step and channel, taken off

The one file of this folder that imports papers. Each stage can be left out (`--without omq`) to see what it is worth.
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
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import LearnRanges, Reconstruct
from lowtide.stages.tiar import TIAR

FEW = 3  # weights of so few bits gain from a lesson of the whole network after that of each block
NARROW = 6  # inputs of so few bits gain from ranges that are learnt
TIGHT = 4  # inputs of so few bits gain from that too, from ranges that give up their ends, and from log2 for some softmax


def recipe(settings: Settings) -> Recipe:
    narrow, tight = settings.inputs <= NARROW, settings.inputs <= TIGHT
    start = (Collect(), Assign(per_step=True), OMQ(), FitWeights("mse"), TIAR(), Maintain())
    learnt = (
        (LearnRanges(iters=settings.range_iters or max(1, settings.iters // 2)),)
        if narrow or settings.range_iters
        else ()
    )
    adaptive = (DAQ(by="error"),) if tight else ()
    taught = (Distill(),) if settings.weights <= FEW or tight else ()
    return (
        *start,
        Reconstruct(),
        FitRanges("mse" if tight else "minmax"),
        *adaptive,
        *learnt,
        *taught,
        Bias(),
        Pack(),
    )
