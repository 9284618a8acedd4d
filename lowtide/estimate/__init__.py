"""Before a run: the size of the checkpoint, and the memory and time that quantizing takes.

It reads the model's configuration alone.

blueprint     a pipeline from its configuration files, with its denoiser on the meta device
size          the plan that a recipe ends with, and the exact size of its checkpoint
prediction    seconds and bytes of each stage, on this machine
on_card       memory on an accelerator, and its speed, probed or reckoned
cards         what the makers of some cards state
result        what `plan` returns

Memory is what comes on top of
Python and its libraries.
"""

from lowtide.estimate.prediction import plan
from lowtide.estimate.result import Estimate, FitChoice, MemoryEstimate, StageEstimate

__all__ = [
    "Estimate",
    "FitChoice",
    "MemoryEstimate",
    "StageEstimate",
    "plan",
]
