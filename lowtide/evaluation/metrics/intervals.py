"""Bootstrap intervals: what a metric might have been with other seeds.

A resample is a row of counts, how often each image was drawn; every metric's resamples are computed from counts, so that
nothing is copied. Drawing with repeats makes sets look less varied and moves set metrics; so an interval is the resamples'
spread laid around the value itself.
"""

import numpy as np
import torch

from lowtide.evaluation.metrics import sets
from lowtide.evaluation.metrics.statistics import Statistics, root_trace, square_root

RESAMPLES = 200
LEVEL = 0.95


def draws(n: int, *, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resamples x images: how often each image was drawn."""
    return (
        np.random.default_rng(seed)
        .multinomial(n, np.full(n, 1 / n), size=resamples)
        .astype(np.float64)
    )


def interval(value: float, resamples: np.ndarray, *, level: float = LEVEL) -> tuple[float, float]:
    """The ends of the middle `level` of the resamples, moved so that they lie around `value`."""
    low, high = np.quantile(resamples - resamples.mean(), [(1 - level) / 2, (1 + level) / 2])
    return value + float(low), value + float(high)


def means(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of a mean over images."""
    return counts @ values / len(values)


def frechets(features: np.ndarray, reference: Statistics, counts: np.ndarray) -> np.ndarray:
    """Resamples of the Fréchet distance."""
    # Centred first: sums of squares far from zero lose digits.
    x, b = features.astype(np.float64) - reference.mean, reference.covariance
    turned, squares = x @ square_root(b), np.square(x).sum(1)
    mean = counts @ x / len(x)
    away = np.square(mean).sum(1)
    spread = (counts @ squares - len(x) * away) / (len(x) - 1)
    return away + spread + np.trace(b) - 2 * np.array([root_spread(turned, row) for row in counts])


def root_spread(turned: np.ndarray, count: np.ndarray) -> float:
    """The trace of the square root of a resample's covariance, over images or over features, whichever are fewer."""
    drawn, count = turned[count > 0], count[count > 0]
    n = count.sum()
    scaled = (drawn - count @ drawn / n) * np.sqrt(count / (n - 1))[:, None]
    return root_trace(scaled @ scaled.T if len(scaled) < scaled.shape[1] else scaled.T @ scaled)


def kernel_distances(ours: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of the kernel distance over whole sets; pairs of an image with its own copy are left out.

    The reference's own term is the same in all of them and does not matter to a spread.
    """
    x, y, pairs, cross = (
        ours.astype(np.float64),
        reference.astype(np.float64),
        np.zeros(len(counts)),
        [],
    )
    for start in range(0, len(x), sets.PIECE):
        rows = slice(start, start + sets.PIECE)
        values = sets.kernel(x[rows], x)
        values[np.arange(len(values)), np.arange(start, start + len(values))] = 0
        pairs += ((counts[:, rows] @ values) * counts).sum(1)
        cross.append(sets.kernel(x[rows], y).mean(1))
    number = len(x) ** 2 - np.square(counts).sum(1)
    return pairs / number - 2 * means(np.concatenate(cross), counts)


def inception_scores(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of the inception score, in one split."""
    log_p = sets.log_softmax(logits)
    p = np.exp(log_p)
    q = means(p, counts)
    return np.exp(means((p * log_p).sum(1), counts) - (q * sets.safe_log(q)).sum(1))


def recalls(ours: np.ndarray, reference: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Resamples of recall: the balls of images that were not drawn are gone, the others keep their reach."""
    drawn = torch.from_numpy(counts > 0).float().T
    hits = [
        (piece.float() @ drawn > 0).double() for piece in sets.hit(reference, ours, sets.NEIGHBOURS)
    ]
    return torch.cat(hits).mean(0).numpy()
