"""The loss of relations between positions, made row by row where whole tables would not fit."""

from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowtide.costs import FLOAT, Cost, Work, Workload

# Relations in memory at once: 64 MiB in float32, and so many copies of them with a gradient.
MOST_RELATIONS = 1 << 24
TABLE_COPIES = 6


def relation_loss(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """KL(theirs || ours) of softmax(f' f / T): summed over positions, averaged over samples.

    Both features are (steps, samples, channels, positions). A table of relations has a row for each
    position. Tables that are too large are made of some rows at a time, and once more for the
    gradient.
    """
    ours = smoothed(ours)
    theirs = smoothed(theirs)
    divergence = partial(_divergence, temperature=temperature)
    rows = table_rows(*ours.shape[::2])
    if rows == ours.shape[2]:
        return divergence(ours, theirs, ours, theirs) / len(ours)
    pairs = zip(ours.split(rows, 2), theirs.split(rows, 2), strict=True)
    parts = [checkpoint(divergence, *pair, ours, theirs, use_reentrant=False) for pair in pairs]
    return torch.stack(parts).sum() / len(ours)


def smoothed(features: Tensor) -> Tensor:
    """The mean over the steps, with channels of length one: (samples, channels, positions)."""
    return F.normalize(features.float().mean(0), dim=1)


def _divergence(
    ours: Tensor, theirs: Tensor, all_ours: Tensor, all_theirs: Tensor, *, temperature: float
) -> Tensor:
    """KL of the relations of some positions with all positions, summed."""
    log_q = _relations(ours, all_ours, temperature)
    log_p = _relations(theirs, all_theirs, temperature)
    return (log_p.exp() * (log_p - log_q)).sum()


def _relations(some: Tensor, every: Tensor, temperature: float) -> Tensor:
    """log softmax(f' f / T): (samples, some positions, all positions)."""
    return (some.transpose(1, 2) @ every / temperature).log_softmax(-1)


def table_rows(samples: int, positions: int) -> int:
    """How many rows of the relations of all samples are made at once; all of them if they fit."""
    return max(1, min(positions, MOST_RELATIONS // (samples * positions)))


def relation_cost(load: Workload, steps: int) -> Cost:
    """In each iteration one float pass more, and the tables; the bytes of the tables."""
    channels, positions = _feature_shape(load, load.network.adapter.ends()[1])
    samples = max(1, min(load.settings.batch, load.calls * load.batch) // steps)
    rows = table_rows(samples, positions)
    # Forward, twice as much backward, and once more forward where tables are made in parts.
    passes = 3 if rows == positions else 4
    relations = samples * positions**2
    work = Work(product=2 * passes * relations * channels, values=TABLE_COPIES * relations)
    whole = load.forward(load.network.whole, samples * steps)
    seconds = load.settings.iters * (whole + load.speed.forward(work))
    return Cost(seconds, FLOAT * TABLE_COPIES * samples * rows * positions)


def _feature_shape(load: Workload, layer: str) -> tuple[int, int]:
    """Channels and positions of this layer's input."""
    nodes = (node for name, node in load.network.graph.leaf_nodes() if name == layer)
    _, *shape = load.network.shape(next(nodes).uses()[0])
    if isinstance(load.network.adapter.all_layers[layer], nn.Linear):
        return shape[-1], prod(shape[:-1])
    return shape[0], prod(shape[1:])
