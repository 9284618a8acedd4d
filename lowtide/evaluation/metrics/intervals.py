"""Bootstrap intervals: the range of a metric over other seeds.

A resample is a row of counts: how often each image was drawn. The resamples of each metric are
computed from these counts, so that no image is copied. Sets drawn with repetition look less varied
than they are, which shifts set metrics; so the interval is the spread of the resamples, placed
around the value itself.

`counts` has the shape (resamples, images) everywhere, and results have the shape (resamples,).
"""

import numpy as np
import torch

from lowtide.evaluation.metrics import sets
from lowtide.evaluation.metrics.statistics import Statistics, root_trace, square_root

RESAMPLES = 200
LEVEL = 0.95


def draws(n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """How often each image was drawn: (resamples, n)."""
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples)
    return counts.astype(np.float64)


def interval(value: float, resamples: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """The ends of the middle `level` of the resamples, moved so that they lie around `value`."""
    low, high = np.quantile(resamples - resamples.mean(), [(1 - level) / 2, (1 + level) / 2])
    return value + float(low), value + float(high)


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of a mean over images."""
    return counts @ values / len(values)


def frechets(features: np.ndarray, reference: Statistics, counts: np.ndarray) -> np.ndarray:
    """Resamples of the Fréchet distance; features: (images, features)."""
    # The mean is subtracted first: squares of large numbers lose digits when they are summed.
    x = features.astype(np.float64) - reference.mean
    covariance = reference.covariance
    projected = x @ square_root(covariance)
    squares = np.square(x).sum(1)
    mean = counts @ x / len(x)
    mean_squares = np.square(mean).sum(1)
    variance = (counts @ squares - len(x) * mean_squares) / (len(x) - 1)
    roots = np.array([_root_trace_of(projected, row) for row in counts])
    return mean_squares + variance + np.trace(covariance) - 2 * roots


def _root_trace_of(projected: np.ndarray, counts: np.ndarray) -> float:
    """The trace of the square root of one resample's covariance; counts: (images,).

    The smaller of the matrices over images and over features has the same eigenvalues.
    """
    drawn = projected[counts > 0]
    counts = counts[counts > 0]
    n = counts.sum()
    scaled = (drawn - counts @ drawn / n) * np.sqrt(counts / (n - 1))[:, None]
    return root_trace(scaled @ scaled.T if len(scaled) < scaled.shape[1] else scaled.T @ scaled)


def kernel_distances(ours: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of the kernel distance over whole sets, without pairs of an image and its copy.

    The reference's own term is left out: it is the same in all resamples and does not change the
    spread.
    """
    x = ours.astype(np.float64)
    y = reference.astype(np.float64)
    within = np.zeros(len(counts))
    between = []
    for start in range(0, len(x), sets.CHUNK):
        rows = slice(start, start + sets.CHUNK)
        values = sets.kernel(x[rows], x)
        values[np.arange(len(values)), np.arange(start, start + len(values))] = 0
        within += ((counts[:, rows] @ values) * counts).sum(1)
        between.append(sets.kernel(x[rows], y).mean(1))
    pairs = len(x) ** 2 - np.square(counts).sum(1)
    return within / pairs - 2 * means(np.concatenate(between), counts)


def inception_scores(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of the inception score, in one split."""
    log_p = sets.log_softmax(logits)
    p = np.exp(log_p)
    q = means(p, counts)
    return np.exp(means((p * log_p).sum(1), counts) - (q * sets.safe_log(q)).sum(1))


def recalls(ours: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of recall: balls of images that were not drawn are removed, others stay as is."""
    drawn = torch.from_numpy(counts > 0).float().T
    chunks = sets.inside_balls(reference, ours, sets.NEIGHBOURS)
    recalled = [(inside.float() @ drawn > 0).double() for inside in chunks]
    return torch.cat(recalled).mean(0).numpy()
