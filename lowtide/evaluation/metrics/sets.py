"""Set against set, on features: kernel distance, inception score, precision and recall, CLIP score.

Rows are images. The Fréchet distance is in statistics.py, for it needs no more than sums.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from lowtide.evaluation.metrics.images import enough

# torch-fidelity's seed and sizes, so that its numbers come out.
SEED, SUBSETS, SUBSET_SIZE, SPLITS = 2020, 100, 1000, 10
NEIGHBOURS = 3
# Rows in memory at once, wherever every image meets every other.
PIECE = 1024


def kernel_distance(
    ours: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> float:
    """Kernel distance (Binkowski et al. 2018; KID on Inception features): mean unbiased MMD^2 over seeded subsets.

    Sets smaller than `subset_size` are taken whole.
    """
    size = min(subset_size, len(ours), len(reference))
    enough(size, 2, "the images that a kernel distance compares")
    draw = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        x = ours[draw.choice(len(ours), size, replace=False)].astype(np.float64)
        y = reference[draw.choice(len(reference), size, replace=False)].astype(np.float64)
        found.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    return float(np.mean(found))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polynomial kernel of degree 3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def within(x: np.ndarray) -> float:
    """Mean kernel over all pairs of different images of one set."""
    values = kernel(x, x)
    return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, seed: int = SEED) -> float:
    """exp of the mean divergence between an image's classes and its split's, averaged over splits (Salimans et al. 2016)."""
    enough(len(logits), splits, "the images of an inception score")
    mixed = np.random.RandomState(seed).permutation(len(logits))
    edges = [len(logits) * part // splits for part in range(splits + 1)]
    log_p = log_softmax(logits[mixed])
    return float(np.mean([one_score(log_p[start:end]) for start, end in pairwise(edges)]))


def one_score(log_p: np.ndarray) -> float:
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - safe_log(p.mean(0)))).sum(1).mean()))


def safe_log(p: np.ndarray) -> np.ndarray:
    """A class that no image can have counts for nothing."""
    return np.log(np.maximum(p, np.finfo(p.dtype).tiny))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits.astype(np.float64)).log_softmax(1).numpy()


def precision(ours: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of our images that lie among the reference (Kynkaanniemi et al. 2019)."""
    return float(covered(ours, reference, neighbours=neighbours).mean())


def recall(ours: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of the reference that lies among our images."""
    return float(covered(reference, ours, neighbours=neighbours).mean())


def covered(points: np.ndarray, balls: np.ndarray, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """For every point, whether a ball holds it that reaches from a centre to its k-th neighbour among the centres."""
    return np.concatenate([hits.any(1).numpy() for hits in hit(points, balls, neighbours)])


def hit(points: np.ndarray, balls: np.ndarray, neighbours: int) -> Iterator[torch.Tensor]:
    """Piece by piece of points: which balls hold them."""
    reach = radii(balls, neighbours)
    for distances in distance_pieces(points, balls):
        yield distances <= reach


def radii(centres: np.ndarray, neighbours: int) -> torch.Tensor:
    """How far the k-th neighbour is; the first is the centre itself."""
    enough(len(centres), neighbours + 1, "the images that precision and recall compare")
    return torch.cat(
        [piece.kthvalue(neighbours + 1).values for piece in distance_pieces(centres, centres)]
    )


def distance_pieces(points: np.ndarray, others: np.ndarray) -> Iterator[torch.Tensor]:
    rows, columns = torch.from_numpy(points).double(), torch.from_numpy(others).double()
    for piece in rows.split(PIECE):
        yield torch.cdist(piece, columns)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 x the cosine between every image and its own text, never below 0 (Hessel et al. 2021)."""
    images, texts = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (images, texts))
    return 100 * np.maximum((images * texts).sum(1), 0)
