"""The race of tiles: on a card, the first product of a shape is timed with the likeliest tiles.

tiles.py reckons which tile ends first, from shares of peak that are estimates. The tiles that it
puts near the first run a few times each on the card, and the fastest is kept for the process. Sums
of integers do not depend on the tile, so a race changes no bit. No race is held while a CUDA graph
is captured or torch compiles, nor in the interpreter: there the reckoned tile runs.
"""

# triton is not installed everywhere.
# pyright: reportMissingImports=false

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from lowtide.kernels.triton.tiles import Choice, Shape, likely

WARM_UPS = 2
ROUNDS = 5
Capability = tuple[int, int]
Launch = Callable[[Choice], None]
# The seconds that one launch takes.
Stopwatch = Callable[[Callable[[], None]], float]


def on_the_card(launch: Callable[[], None]) -> float:
    """The least of a few times, by the card's own events."""
    for _ in range(WARM_UPS):
        launch()
    best = math.inf
    for _ in range(ROUNDS):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        launch()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


@dataclass
class TileRaces:
    """The winners of this process, by card and shape."""

    stopwatch: Stopwatch = on_the_card
    winners: dict[tuple[Capability, Shape], Choice] = field(default_factory=dict)

    def choice(self, x: Tensor, card: Capability, shape: Shape, launch: Launch) -> Choice:
        """The tile for a product of this shape on this card, where x lies.

        `launch` runs it into memory of its own.
        """
        candidates = likely(card, shape)
        key = (card, shape)
        if key in self.winners:
            return self.winners[key]
        if len(candidates) == 1 or not may_race(x):
            return candidates[0]
        times = {each: self._time(launch, each) for each in candidates}
        # Where no candidate fits on the card, the reckoned one gives the error.
        self.winners[key] = min(candidates, key=lambda each: times[each])
        return self.winners[key]

    def _time(self, launch: Launch, choice: Choice) -> float:
        """Infinite for a tile that needs more shared memory or registers than there are."""
        try:
            return self.stopwatch(lambda: launch(choice))
        except OutOfResources:
            return math.inf


def may_race(x: Tensor) -> bool:
    """Whether a launch can be timed now."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.cuda.is_current_stream_capturing()
    )


RACES = TileRaces()
