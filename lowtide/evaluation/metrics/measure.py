"""Metrics by name: one call measures images against a reference, each number with its interval and where it comes from.

Same-seed metrics take the other model's images: psnr, ssim, lpips. Set metrics take images or Statistics: fd, sfd, kd,
precision, recall. `is` and `clip` need no reference, `clip` needs prompts. A distance carries its extractor's name, such as
fd-efficientnet; those of Inception alone are called fid, sfid and kid.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import numpy as np

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import intervals, pairs
from lowtide.evaluation.metrics.cases import METRICS, Case, Metric, Scored
from lowtide.evaluation.metrics.feature_extraction import Extractor
from lowtide.evaluation.metrics.images import checked, enough, same_size
from lowtide.evaluation.metrics.naming import plain_name, title
from lowtide.evaluation.metrics.statistics import Statistics

Reference = np.ndarray | Sequence[np.ndarray] | Statistics | None
EACH = {"psnr": pairs.each_psnr, "ssim": pairs.each_ssim}
# Not asked for by name: latents are no images.
LATENT = Metric(lambda case: case.each(pairs.latent_mse(*case.pair)), False, (0, np.inf))


@dataclass(frozen=True)
class Measured:
    """A number, the interval it lies in with 95 % (bootstrap over images), and all it takes to measure it again.

    One image says nothing about others: it has no interval.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool
    backend: str
    weights: str | None
    resize: str
    seeds: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    images: np.ndarray | Sequence[np.ndarray],
    reference: Reference,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    extractor: str | Extractor = "efficientnet",
    prompts: Sequence[str] = (),
    resamples: int = intervals.RESAMPLES,
) -> dict[str, Measured]:
    """The metrics asked for, under their full names, in that order.

    images: N x height x width x channels, floats in [0, 1]; image k was drawn from seeds[k].
    reference: for same-seed metrics the other model's images; for set metrics images or Statistics.
    extractor: a name of EXTRACTORS, or one loaded from other weights with load_extractor.
    """
    who = extractor if isinstance(extractor, str) else extractor.name
    asked = [plain_name(name, who) for name in names]
    batch = checked(images)
    one_each(len(batch), seeds)
    counts = intervals.draws(len(batch), resamples=resamples)
    case = Case(batch, comparable(batch, reference), extractor, tuple(prompts), counts)
    return {
        title(plain, who): measured(METRICS[plain], METRICS[plain].score(case), seeds)
        for plain in asked
    }


def one_each(found: int, seeds: Sequence[int]) -> None:
    enough(found, 1, "the images")
    if len(seeds) != found:
        raise BadInput(
            f"found {len(seeds)} seeds for {found} images",
            "one for each",
            "pass the seeds they came from",
        )


def comparable(images: np.ndarray, reference: Reference) -> np.ndarray | Statistics | None:
    """A reference of the images' size."""
    if reference is None:
        return None
    good = reference if isinstance(reference, Statistics) else checked(reference)
    same_size(images, *(good.size if isinstance(good, Statistics) else good.shape[1:3]))
    return good


def measured(metric: Metric, scored: Scored, seeds: Sequence[int]) -> Measured:
    low, high = around(metric, scored) if len(seeds) > 1 else (None, None)
    origin, better = scored.origin, metric.higher_is_better
    return Measured(
        scored.value,
        low,
        high,
        len(seeds),
        better,
        origin.backend,
        origin.weights,
        origin.resize,
        ranges(seeds),
    )


def around(metric: Metric, scored: Scored) -> tuple[float, float]:
    low, high = np.clip(intervals.interval(scored.value, scored.resamples), *metric.ends).tolist()
    return low, high


def measure_latents(
    latents: np.ndarray, reference: np.ndarray, *, seeds: Sequence[int]
) -> Measured:
    """The mean squared difference of same-seed latents, of whatever shape: `latent_mse`."""
    if latents.shape != reference.shape:
        found = f"found latents of shape {latents.shape} and {reference.shape}"
        raise BadInput(found, "one shape", "sample both with one pipeline and size")
    one_each(len(latents), seeds)
    case = Case(latents, reference, "none", (), intervals.draws(len(latents)))
    return measured(LATENT, LATENT.score(case), seeds)


def per_image(
    images: np.ndarray, reference: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The values behind psnr and ssim, one for each image; other names are passed over."""
    return {name: EACH[name](images, reference) for name in names if name in EACH}


def ranges(seeds: Sequence[int]) -> str:
    """0, 1, 2, 5 -> 0-2,5."""
    runs = [
        [seed for _, seed in run]
        for _, run in groupby(enumerate(sorted(seeds)), lambda each: each[1] - each[0])
    ]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
