"""Mean and covariance of features as float64 sums, which stream and add up across processes, and the distance of two."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from lowtide.errors import BadInput


@dataclass(frozen=True)
class Statistics:
    """Count, sum and sum of outer products: `+` of two halves is the whole.

    `source` names the extractor, its weights' hash and the resize; `size` is the images' height and width. Both travel with
    the numbers, because a distance between different extractors or resolutions means nothing.
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
        exact = features.astype(np.float64)
        return cls(len(exact), exact.sum(0), exact.T @ exact, source, size)

    def __add__(self, other: "Statistics") -> "Statistics":
        same_kind(self, other)
        return Statistics(
            self.n + other.n,
            self.total + other.total,
            self.outer + other.outer,
            self.source,
            self.size,
        )

    @property
    def mean(self) -> np.ndarray:
        return self.total / self.n

    @property
    def covariance(self) -> np.ndarray:
        if self.n < 2:
            raise BadInput(
                f"found {self.n} images", "at least 2 for a covariance", "sample more seeds"
            )
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
            with np.load(path) as held:
                height, width = held["size"]
                return cls(
                    int(held["n"]),
                    held["total"],
                    held["outer"],
                    str(held["source"]),
                    (int(height), int(width)),
                )
        except (OSError, KeyError, ValueError, BadZipFile) as wrong:
            way_out = "write one with Statistics.save"
            raise BadInput(
                f"found no statistics in {path}", "an .npz file of lowtide's", way_out
            ) from wrong


def same_kind(ours: Statistics, reference: Statistics) -> None:
    """Two statistics that may be added or compared."""
    if ours.source != reference.source or ours.total.shape != reference.total.shape:
        found = f"found statistics of {kind(reference)} beside {kind(ours)}"
        raise BadInput(
            found, "one extractor with one file of weights", "collect the reference again"
        )
    if ours.size != reference.size:
        (height, width), (other_height, other_width) = ours.size, reference.size
        found = (
            f"found images of {height} x {width} and a reference of {other_height} x {other_width}"
        )
        raise BadInput(found, "one resolution", "take a reference of the images' own size")


def kind(statistics: Statistics) -> str:
    return f"{statistics.source or 'unnamed'} ({len(statistics.total)} features)"


def added(parts: Iterable[Statistics]) -> Statistics:
    """The whole of what batches or processes collected."""
    first, *rest = parts
    return sum(rest, start=first)


def frechet(ours: Statistics, reference: Statistics) -> float:
    """The Fréchet distance of two Gaussians: |mean difference|^2 + tr(A + B - 2 (A B)^1/2)."""
    same_kind(ours, reference)
    a, b = ours.covariance, reference.covariance
    root = square_root(b)
    away = ours.mean - reference.mean
    return float(away @ away + np.trace(a) + np.trace(b) - 2 * root_trace(root.T @ a @ root))


def square_root(matrix: np.ndarray) -> np.ndarray:
    """R with R R^T = matrix, as narrow as its rank: few images make few columns."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > noise(values)
    return vectors[:, kept] * np.sqrt(values[kept])


def root_trace(matrix: np.ndarray) -> float:
    """The trace of a symmetric matrix's square root. Rounding noise is cut off: a root makes it large, and it is many."""
    values = np.linalg.eigvalsh(matrix)
    return float(np.sqrt(values[values > noise(values)]).sum())


def noise(values: np.ndarray) -> float:
    return len(values) * np.finfo(np.float64).eps * np.abs(values).max(initial=0)
