"""minmax: plain post-training quantization, the baseline of every table.

Each weight is rounded to nearest on the min-max range of its output channel. Each input has one
min-max range for all timesteps. Nothing is learnt and nothing depends on the timestep: the papers
set out to improve on this.
"""

from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack


def recipe(settings: Settings) -> Recipe:
    return (Collect(), Assign(), FitWeights("minmax"), FitRanges("minmax"), Pack())
