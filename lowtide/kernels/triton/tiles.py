"""Tile shapes of the Triton kernels for each kind of card, and how to split a long sum.

The shares of peak are estimates until they are measured: bench/gpu/kernels.py times every shape.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product
from math import ceil

INTERPRETER = (0, 0)  # the capability of a CPU under TRITON_INTERPRET=1
SPLITS = (1, 2, 4, 8)
NEAR = 1.5  # times the least: the count is not more exact than that
RACERS = 4


@dataclass(frozen=True)
class Tile:
    """Rows and columns of the output, values of k in a step, warps and stages of the pipeline.

    `share`: the part of a card's integer peak that the main loop reaches, with k without end.
    """

    rows: int
    columns: int
    k: int
    warps: int
    stages: int
    share: float = 1.0


@dataclass(frozen=True)
class Card:
    """A kind of card: its multiprocessors, and the bytes of shared memory of one block."""

    processors: int
    shared: int
    tiles: tuple[Tile, ...]


HOPPER = (
    Tile(256, 128, 128, 8, 3, 0.75),
    Tile(128, 128, 128, 8, 3, 0.65),
    Tile(64, 128, 128, 8, 4, 0.5),
    Tile(64, 64, 128, 4, 4, 0.35),
    Tile(128, 128, 64, 8, 4, 0.55),
    Tile(64, 128, 64, 8, 4, 0.4),
    Tile(64, 64, 64, 4, 5, 0.3),
)
# On these, 128 x 128 sums and an epilogue with a residual do not fit in the registers.
AMPERE = (
    Tile(128, 64, 128, 8, 3, 0.65),
    Tile(64, 128, 128, 8, 3, 0.65),
    Tile(64, 64, 128, 4, 4, 0.45),
    Tile(128, 64, 64, 8, 4, 0.6),
    Tile(64, 128, 64, 8, 4, 0.6),
    Tile(64, 64, 64, 4, 5, 0.4),
)
ADA = (
    Tile(128, 64, 128, 8, 3, 0.65),
    Tile(64, 128, 128, 8, 3, 0.65),
    Tile(64, 64, 128, 4, 3, 0.45),
    Tile(128, 64, 64, 8, 4, 0.6),
    Tile(64, 128, 64, 8, 4, 0.6),
    Tile(64, 64, 64, 4, 4, 0.4),
)
TINY = (Tile(16, 16, 128, 1, 1), Tile(16, 16, 64, 1, 1))
CARDS = {
    (9, 0): Card(132, 232_448, HOPPER),
    (8, 9): Card(128, 101_376, ADA),
    (8, 6): Card(84, 101_376, ADA),
    (8, 0): Card(108, 166_912, AMPERE),
    INTERPRETER: Card(4, 2**20, TINY),
}


def card_of(capability: tuple[int, int]) -> Card:
    """The table's card; a card that is not in it counts as the newest that is not newer."""
    known = [each for each in sorted(CARDS) if each <= capability]
    return CARDS[known[-1]]


@dataclass(frozen=True)
class Choice:
    """A tile, and into how many parts of k its sums are split."""

    tile: Tile
    split: int = 1


@dataclass(frozen=True)
class Shape:
    """A product. `run`, `step`: what divides the k of a tile, and what it divides.

    `most`: values of the largest tile.
    """

    rows: int
    columns: int
    k: int
    run: int
    step: int
    most: int


def choose(capability: tuple[int, int], shape: Shape, splits: tuple[int, ...] = SPLITS) -> Choice:
    """The tile that ends first by a simple count."""
    return likely(capability, shape, splits)[0]


@cache
def likely(
    capability: tuple[int, int], shape: Shape, splits: tuple[int, ...] = SPLITS
) -> tuple[Choice, ...]:
    """The tiles that may end first, by a simple count: the likeliest first, a few in all.

    A card works in waves of one tile for each multiprocessor. A split adds parts until the waves
    are full, and costs a pass over the sums.
    """
    card = card_of(capability)
    tiles = [tile for tile in card.tiles if shape.step % tile.k == 0 and tile.k % shape.run == 0]
    fitting = [tile for tile in tiles if tile.rows * tile.columns <= shape.most]
    choices = [Choice(*pair) for pair in product(fitting, splits)]
    sensible = [
        each for each in choices if each.split == 1 or shape.k >= 8 * each.split * each.tile.k
    ]
    times = {each: _time(each, card, shape) for each in sensible}
    ranked = sorted(sensible, key=lambda each: times[each])
    near = [each for each in ranked if times[each] <= NEAR * times[ranked[0]]]
    return tuple(near[:RACERS])


# Costs in products of one multiprocessor: of starting and storing a value, of a value of one more
# part, which goes through memory, and of the launch that adds the parts.
_START = 512
_PART = 1500
_LAUNCH = 2e7


def _time(choice: Choice, card: Card, shape: Shape) -> float:
    tile = choice.tile
    count = ceil(shape.rows / tile.rows) * ceil(shape.columns / tile.columns) * choice.split
    waves = ceil(count / card.processors)
    length = shape.k / choice.split + _START
    time = waves * tile.rows * tile.columns * length / tile.share
    if choice.split == 1:
        return time
    return time + _LAUNCH + shape.rows * shape.columns * choice.split * _PART / card.processors
