"""Metrics of image sets on features: kernel distance, inception score, precision, recall, CLIP.

Features have the shape (images, features). The Fréchet distance is in statistics.py, because it
needs only sums over the images.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from lowtide.evaluation.metrics.image_checks import check_count

# The seed and the sizes of torch-fidelity, so that the numbers are the same.
SEED = 2020
SUBSETS = 100
SUBSET_SIZE = 1000
SPLITS = 10
NEIGHBOURS = 3
# Rows in memory at once where all pairs of images are compared.
CHUNK = 1024


def kernel_distance(
    ours: np.ndarray,
    reference: np.ndarray,
    *,
    subsets: int = SUBSETS,
    subset_size: int = SUBSET_SIZE,
    seed: int = SEED,
) -> float:
    """Kernel distance (Binkowski et al. 2018; KID on Inception features).

    It is the mean unbiased MMD^2 over seeded subsets. A set smaller than `subset_size` is used
    whole.
    """
    size = min(subset_size, len(ours), len(reference))
    check_count(size, 2, "the images that a kernel distance compares")
    random = np.random.RandomState(seed)
    distances = []
    for _ in range(subsets):
        x = ours[random.choice(len(ours), size, replace=False)].astype(np.float64)
        y = reference[random.choice(len(reference), size, replace=False)].astype(np.float64)
        distances.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    return float(np.mean(distances))


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The polynomial kernel of degree 3: (rows of x, rows of y)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def within(x: np.ndarray) -> float:
    """Mean kernel over all pairs of different images of one set."""
    values = kernel(x, x)
    return float((values.sum() - np.trace(values)) / (len(x) * (len(x) - 1)))


def inception_score(logits: np.ndarray, *, splits: int = SPLITS, seed: int = SEED) -> float:
    """The inception score (Salimans et al. 2016).

    It is exp of the mean KL divergence of an image's class probabilities from those of its split,
    averaged over the splits.
    """
    check_count(len(logits), splits, "the images of an inception score")
    order = np.random.RandomState(seed).permutation(len(logits))
    edges = [len(logits) * part // splits for part in range(splits + 1)]
    log_p = log_softmax(logits[order])
    return float(np.mean([_split_score(log_p[start:end]) for start, end in pairwise(edges)]))


def _split_score(log_p: np.ndarray) -> float:
    p = np.exp(log_p)
    return float(np.exp((p * (log_p - safe_log(p.mean(0)))).sum(1).mean()))


def safe_log(p: np.ndarray) -> np.ndarray:
    """log p, finite for p = 0, so that a class of probability 0 adds nothing to a divergence."""
    return np.log(np.maximum(p, np.finfo(p.dtype).tiny))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(logits.astype(np.float64)).log_softmax(1).numpy()


def precision(ours: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of our images in the manifold of the reference (Kynkaanniemi et al. 2019)."""
    return float(covered(ours, reference, neighbours=neighbours).mean())


def recall(ours: np.ndarray, reference: np.ndarray, *, neighbours: int = NEIGHBOURS) -> float:
    """The share of the reference in the manifold of our images."""
    return float(covered(reference, ours, neighbours=neighbours).mean())


def covered(points: np.ndarray, centres: np.ndarray, *, neighbours: int = NEIGHBOURS) -> np.ndarray:
    """For each point, whether at least one ball contains it: (points,), bool.

    A ball reaches from its centre to the k-th nearest of the other centres.
    """
    chunks = inside_balls(points, centres, neighbours)
    return np.concatenate([inside.any(1).numpy() for inside in chunks])


def inside_balls(
    points: np.ndarray, centres: np.ndarray, neighbours: int
) -> Iterator[torch.Tensor]:
    """Which ball contains which point: bool tensors of shape (up to CHUNK points, centres)."""
    reach = radii(centres, neighbours)
    for distances in _distances(points, centres):
        yield distances <= reach


def radii(centres: np.ndarray, neighbours: int) -> torch.Tensor:
    """The distance of each centre to its k-th neighbour; the nearest one is the centre itself."""
    check_count(len(centres), neighbours + 1, "the images that precision and recall compare")
    chunks = _distances(centres, centres)
    return torch.cat([chunk.kthvalue(neighbours + 1).values for chunk in chunks])


def _distances(points: np.ndarray, others: np.ndarray) -> Iterator[torch.Tensor]:
    """Euclidean distances, in tensors of shape (up to CHUNK points, others)."""
    columns = torch.from_numpy(others).double()
    for chunk in torch.from_numpy(points).double().split(CHUNK):
        yield torch.cdist(chunk, columns)


def clip_scores(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """100 x the cosine of each image and its own text, at least 0 (Hessel et al. 2021): (N,)."""
    cosines = (_normalized(images) * _normalized(texts)).sum(1)
    return 100 * np.maximum(cosines, 0)


def _normalized(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)
