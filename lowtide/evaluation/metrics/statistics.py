"""Mean and covariance of features as float64 sums that add up across batches, and FD of two."""

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lowtide.errors import BadInput

# What numpy raises for a file that is no .npz, is cut short, or lacks an entry.
_UNREADABLE = (OSError, EOFError, KeyError, ValueError, TypeError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class Statistics:
    """Count, sum and sum of outer products of features: `+` of two halves is the whole.

    n: the number of images. total: (features,). outer: (features, features). source: the
    extractor, the hash of its weights and the layer. size: the images' height and width. Source
    and size are stored with the sums, because a distance between different extractors or
    resolutions has no meaning.
    """

    n: int
    total: np.ndarray
    outer: np.ndarray
    source: str = ""
    size: tuple[int, int] = (0, 0)

    @classmethod
    def of(
        cls, features: np.ndarray, *, source: str = "", size: tuple[int, int] = (0, 0)
    ) -> "Statistics":
        """The statistics of features of shape (images, features)."""
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(0), exact.T @ exact, source, size)

    def __add__(self, other: "Statistics") -> "Statistics":
        _check_same_kind(self, other)
        return Statistics(
            n=self.n + other.n,
            total=self.total + other.total,
            outer=self.outer + other.outer,
            source=self.source,
            size=self.size,
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        if self.n < 2:
            wrong = f"found {self.n} images"
            raise BadInput(wrong, "at least 2 for a covariance", "sample more seeds")
        return (self.outer - self.n * np.outer(self.mean, self.mean)) / (self.n - 1)

    def save(self, path: str | Path) -> None:
        """Write an .npz file."""
        with open(path, "wb") as file:
            np.savez(
                file,
                n=self.n,
                total=self.total,
                outer=self.outer,
                source=self.source,
                size=self.size,
            )

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        try:
            return _read(path)
        except _UNREADABLE as error:
            raise BadInput(
                f"found no statistics in {path}",
                "an .npz file that Statistics.save wrote",
                "write one with Statistics.save",
            ) from error


def _read(path: str | Path) -> Statistics:
    with np.load(path) as entries:
        height, width = entries["size"]
        statistics = Statistics(
            n=int(entries["n"]),
            total=entries["total"],
            outer=entries["outer"],
            source=str(entries["source"]),
            size=(int(height), int(width)),
        )
    features = statistics.total.size
    if statistics.total.shape != (features,) or statistics.outer.shape != (features, features):
        raise ValueError(f"sums of shape {statistics.total.shape} and {statistics.outer.shape}")
    if statistics.n < 1 or not np.isfinite(statistics.outer).all():
        raise ValueError("no images, or sums that are not finite")
    return statistics


def _check_same_kind(ours: Statistics, reference: Statistics) -> None:
    """Statistics that are added or compared come from one extractor and one resolution."""
    if ours.source != reference.source or ours.total.shape != reference.total.shape:
        wrong = f"found statistics of {_kind(reference)} beside {_kind(ours)}"
        expected = "one extractor with one file of weights"
        raise BadInput(wrong, expected, "collect the reference again")
    if ours.size != reference.size:
        own = " x ".join(map(str, ours.size))
        other = " x ".join(map(str, reference.size))
        wrong = f"found images of {own} and a reference of {other}"
        raise BadInput(wrong, "one resolution", "use a reference of the images' own size")


def _kind(statistics: Statistics) -> str:
    return f"{statistics.source or 'unnamed'} ({len(statistics.total)} features)"


def added(parts: Iterable[Statistics]) -> Statistics:
    """The sum of the statistics of batches or processes."""
    first, *rest = parts
    return sum(rest, start=first)


def frechet(ours: Statistics, reference: Statistics) -> float:
    """The Fréchet distance of two Gaussians: |mean difference|^2 + tr(A + B - 2 (A B)^1/2)."""
    _check_same_kind(ours, reference)
    a = ours.covariance
    b = reference.covariance
    root = square_root(b)
    difference = ours.mean - reference.mean
    traces = difference @ difference + np.trace(a) + np.trace(b)
    return float(traces - 2 * root_trace(root.T @ a @ root))


def square_root(matrix: np.ndarray) -> np.ndarray:
    """R with R R^T = matrix, of shape (features, rank): few images give few columns."""
    values, vectors = np.linalg.eigh(matrix)
    significant = values > _noise(values)
    return vectors[:, significant] * np.sqrt(values[significant])


def root_trace(matrix: np.ndarray) -> float:
    """The trace of the square root of a symmetric matrix.

    Eigenvalues that are rounding noise are left out: there are many, and a root enlarges them.
    """
    values = np.linalg.eigvalsh(matrix)
    return float(np.sqrt(values[values > _noise(values)]).sum())


def _noise(values: np.ndarray) -> float:
    return len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0)
