"""The metrics one by one: the inputs that each needs, its value and its resamples."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import intervals, lpips, pairs, sets, vision_transformer
from lowtide.evaluation.metrics.extractors import load_extractor
from lowtide.evaluation.metrics.feature_extraction import (
    Extractor,
    ImageFeatures,
    Origin,
    image_size,
)
from lowtide.evaluation.metrics.image_checks import check_count
from lowtide.evaluation.metrics.statistics import Statistics, frechet
from lowtide.machine.devices import CPU

_LOWTIDE = Origin()


@dataclass(frozen=True)
class MetricResult:
    """The value of a metric, its resamples (resamples,), and the origin of both."""

    value: float
    resamples: np.ndarray
    origin: Origin


@dataclass(frozen=True)
class MetricInputs:
    """The inputs of all metrics; features are computed once, and only if a metric needs them.

    images: (N, height, width, channels). network: the extractor, or the name of one that is loaded
    when needed. counts: the draws of the bootstrap, (resamples, N). device: where networks that
    are loaded here compute.
    """

    images: np.ndarray
    reference: np.ndarray | Statistics | None
    network: str | Extractor
    prompts: tuple[str, ...]
    counts: np.ndarray
    device: torch.device = CPU

    @cached_property
    def extractor(self) -> Extractor:
        if isinstance(self.network, str):
            return load_extractor(self.network).on(self.device)
        return self.network

    @cached_property
    def features(self) -> ImageFeatures:
        return self.extractor(self.images)

    @cached_property
    def reference_features(self) -> ImageFeatures:
        return self.extractor(self.reference_images)

    @property
    def reference_images(self) -> np.ndarray:
        if not isinstance(self.reference, np.ndarray):
            kind = "no reference" if self.reference is None else "a reference of statistics alone"
            expected = "reference images for this metric"
            raise BadInput(f"found {kind}", expected, "pass the images themselves")
        return self.reference

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """The images and one reference image for each."""
        reference = self.reference_images
        if len(reference) != len(self.images):
            wrong = f"found {len(self.images)} images and {len(reference)} of the reference"
            expected = "one reference image for each seed"
            raise BadInput(wrong, expected, "sample both from the same seeds")
        return self.images, reference

    def reference_statistics(self, layer: str) -> Statistics:
        if isinstance(self.reference, Statistics):
            return self.reference
        return self.statistics(self.reference_features, layer)

    def statistics(self, features: ImageFeatures, layer: str) -> Statistics:
        return Statistics.of(
            features.layer(layer),
            source=self.extractor.source(layer),
            size=image_size(self.images),
        )

    def mean(self, values: np.ndarray, origin: Origin = _LOWTIDE) -> MetricResult:
        """The result of a metric that is a mean over images; values: (N,)."""
        return MetricResult(float(values.mean()), intervals.means(values, self.counts), origin)


def _psnr(inputs: MetricInputs) -> MetricResult:
    return inputs.mean(pairs.each_psnr(*inputs.pair))


def _ssim(inputs: MetricInputs) -> MetricResult:
    return inputs.mean(pairs.each_ssim(*inputs.pair))


def _lpips(inputs: MetricInputs) -> MetricResult:
    net, origin = lpips.load()
    return inputs.mean(lpips.each_lpips(net.to(inputs.device), *inputs.pair), origin)


def _latent_mse(inputs: MetricInputs) -> MetricResult:
    return inputs.mean(pairs.latent_mse(*inputs.pair))


def _frechet_distance(inputs: MetricInputs, layer: str = "pooled") -> MetricResult:
    """A reference may be statistics alone."""
    reference = inputs.reference_statistics(layer)
    check_count(len(inputs.images), 2, "the images that a Fréchet distance compares")
    check_count(reference.n, 2, "the reference's images that a Fréchet distance compares")
    value = frechet(inputs.statistics(inputs.features, layer), reference)
    resamples = intervals.frechets(inputs.features.layer(layer), reference, inputs.counts)
    return MetricResult(value, resamples, inputs.extractor.origin)


def _spatial_frechet_distance(inputs: MetricInputs) -> MetricResult:
    return _frechet_distance(inputs, "spatial")


def _kernel_distance(inputs: MetricInputs) -> MetricResult:
    ours = inputs.features.pooled
    reference = inputs.reference_features.pooled
    value = sets.kernel_distance(ours, reference)
    resamples = intervals.kernel_distances(ours, reference, inputs.counts)
    return MetricResult(value, resamples, inputs.extractor.origin)


def _precision(inputs: MetricInputs) -> MetricResult:
    covered = sets.covered(inputs.features.pooled, inputs.reference_features.pooled)
    return inputs.mean(covered.astype(float), inputs.extractor.origin)


def _recall(inputs: MetricInputs) -> MetricResult:
    ours = inputs.features.pooled
    reference = inputs.reference_features.pooled
    value = sets.recall(ours, reference)
    resamples = intervals.recalls(ours, reference, inputs.counts)
    return MetricResult(value, resamples, inputs.extractor.origin)


def _inception_score(inputs: MetricInputs) -> MetricResult:
    logits = inputs.features.layer("logits")
    value = sets.inception_score(logits)
    resamples = intervals.inception_scores(logits, inputs.counts)
    return MetricResult(value, resamples, inputs.extractor.origin)


def _clip_score(inputs: MetricInputs) -> MetricResult:
    """Always uses CLIP, whatever the extractor of the other metrics."""
    is_clip = isinstance(inputs.network, Extractor) and inputs.network.name == "clip"
    extractor = inputs.extractor if is_clip else load_extractor("clip").on(inputs.device)
    if len(inputs.prompts) != len(inputs.images):
        wrong = f"found {len(inputs.prompts)} prompts for {len(inputs.images)} images"
        raise BadInput(wrong, "one prompt for each image", "pass `prompts`")
    texts = vision_transformer.read_prompts(extractor, inputs.prompts)
    return inputs.mean(sets.clip_scores(extractor(inputs.images).pooled, texts), extractor.origin)


@dataclass(frozen=True)
class Metric:
    """A metric: how it is computed, which direction is better, and the range of its values.

    named_after_extractor: the full name contains the extractor, such as fd-efficientnet.
    """

    compute: Callable[[MetricInputs], MetricResult]
    higher_is_better: bool
    bounds: tuple[float, float] = (-np.inf, np.inf)
    named_after_extractor: bool = False


METRICS = {
    "psnr": Metric(_psnr, higher_is_better=True),
    "ssim": Metric(_ssim, higher_is_better=True, bounds=(-1, 1)),
    "lpips": Metric(_lpips, higher_is_better=False, bounds=(0, np.inf)),
    "fd": Metric(
        _frechet_distance,
        higher_is_better=False,
        bounds=(0, np.inf),
        named_after_extractor=True,
    ),
    "sfd": Metric(
        _spatial_frechet_distance,
        higher_is_better=False,
        bounds=(0, np.inf),
        named_after_extractor=True,
    ),
    "kd": Metric(_kernel_distance, higher_is_better=False, named_after_extractor=True),
    "precision": Metric(_precision, higher_is_better=True, bounds=(0, 1)),
    "recall": Metric(_recall, higher_is_better=True, bounds=(0, 1)),
    "is": Metric(
        _inception_score,
        higher_is_better=True,
        bounds=(1, np.inf),
        named_after_extractor=True,
    ),
    "clip": Metric(_clip_score, higher_is_better=True, bounds=(0, 100)),
}
# No metric of images, so not in the list of metrics by name.
LATENT_MSE = Metric(_latent_mse, higher_is_better=False, bounds=(0, np.inf))
