"""Metrics by name: images against a reference, each number with its interval and its origin.

Metrics of image pairs need the other model's images: psnr, ssim, lpips. Metrics of image sets need
images or Statistics: fd, sfd, kd, precision, recall. `is` and `clip` need no reference; `clip`
needs prompts. The name of a distance contains its extractor, such as fd-efficientnet; only those
of Inception are called fid, sfid and kid.
"""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import intervals, pairs
from lowtide.evaluation.metrics.feature_extraction import Extractor
from lowtide.evaluation.metrics.image_checks import check_count, check_same_size, checked_images
from lowtide.evaluation.metrics.metric_definitions import (
    LATENT_MSE,
    METRICS,
    Metric,
    MetricInputs,
    MetricResult,
)
from lowtide.evaluation.metrics.metric_names import full_name, plain_name
from lowtide.evaluation.metrics.statistics import Statistics
from lowtide.machine.devices import CPU
from lowtide.report.evidence import Measurement

Reference = np.ndarray | Sequence[np.ndarray] | Statistics | None
_PER_IMAGE = {"psnr": pairs.each_psnr, "ssim": pairs.each_ssim}


def measure(
    images: np.ndarray | Sequence[np.ndarray],
    reference: Reference,
    names: Sequence[str],
    *,
    seeds: Sequence[int],
    extractor: str | Extractor = "efficientnet",
    prompts: Sequence[str] = (),
    device: torch.device = CPU,
) -> dict[str, Measurement]:
    """The metrics by their full names, in the order of `names`.

    images: (N, height, width, channels), floats in [0, 1]; image k was sampled from seeds[k].
    reference: the other model's images for metrics of pairs; images or Statistics for metrics of
    sets.
    extractor: a name of EXTRACTORS, or an extractor that load_extractor made of other weights.
    device: where networks that are loaded by name compute.
    """
    network = extractor if isinstance(extractor, str) else extractor.name
    metrics = [plain_name(name, network) for name in names]
    batch = checked_images(images)
    _check_seeds(len(batch), seeds)
    inputs = MetricInputs(
        images=batch,
        reference=_checked_reference(batch, reference),
        network=extractor,
        prompts=tuple(prompts),
        counts=intervals.draws(len(batch)),
        device=device,
    )
    return {
        full_name(plain, network): _computed(METRICS[plain], inputs, seeds) for plain in metrics
    }


def _check_seeds(count: int, seeds: Sequence[int]) -> None:
    check_count(count, 1, "the images")
    if len(seeds) != count:
        wrong = f"found {len(seeds)} seeds for {count} images"
        raise BadInput(wrong, "one for each", "pass the seeds they came from")


def _checked_reference(images: np.ndarray, reference: Reference) -> np.ndarray | Statistics | None:
    """The reference, which must have the images' size."""
    if reference is None:
        return None
    if isinstance(reference, Statistics):
        check_same_size(images, *reference.size)
        return reference
    batch = checked_images(reference)
    check_same_size(images, *batch.shape[1:3])
    return batch


def _computed(metric: Metric, inputs: MetricInputs, seeds: Sequence[int]) -> Measurement:
    result = metric.compute(inputs)
    low, high = _interval(metric, result) if len(seeds) > 1 else (None, None)
    return Measurement(
        value=result.value,
        low=low,
        high=high,
        n=len(seeds),
        higher_is_better=metric.higher_is_better,
        backend=result.origin.backend,
        weights=result.origin.weights,
        resize=result.origin.resize,
        seeds=seed_ranges(seeds),
    )


def _interval(metric: Metric, result: MetricResult) -> tuple[float, float]:
    ends = intervals.interval(result.value, result.resamples)
    low, high = np.clip(ends, *metric.bounds).tolist()
    return low, high


def measure_latents(
    latents: np.ndarray, reference: np.ndarray, *, seeds: Sequence[int]
) -> Measurement:
    """`latent_mse`: the mean squared error of latents of the same seeds, of any shape (N, ...)."""
    if latents.shape != reference.shape:
        wrong = f"found latents of shape {latents.shape} and {reference.shape}"
        raise BadInput(wrong, "one shape", "sample both with one pipeline and size")
    _check_seeds(len(latents), seeds)
    inputs = MetricInputs(
        images=latents,
        reference=reference,
        network="none",
        prompts=(),
        counts=intervals.draws(len(latents)),
    )
    return _computed(LATENT_MSE, inputs, seeds)


def per_image(
    images: np.ndarray, reference: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """The values of psnr and ssim for each image, (N,); other names are ignored."""
    return {name: _PER_IMAGE[name](images, reference) for name in names if name in _PER_IMAGE}


def seed_ranges(seeds: Sequence[int]) -> str:
    """0, 1, 2, 5 -> 0-2,5."""
    # Consecutive seeds have one difference of seed and place.
    places = enumerate(sorted(seeds))
    groups = groupby(places, key=lambda place_and_seed: place_and_seed[1] - place_and_seed[0])
    runs = [[seed for _, seed in group] for _, group in groups]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
