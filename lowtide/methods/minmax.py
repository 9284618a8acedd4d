"""minmax: plain post-training quantization, the zero line of every table.

Weights are rounded to nearest on the min-max range of their output channel; inputs take one min-max range for all
timesteps. Nothing is learnt and nothing knows the time: this is what the papers set out to beat.
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
