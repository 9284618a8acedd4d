"""The metrics one by one: what each asks of the images and their reference, and what its resamples are."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import intervals, lpips, pairs, sets, vision_transformer
from lowtide.evaluation.metrics.extractors import load_extractor
from lowtide.evaluation.metrics.feature_extraction import Extractor, Features, Origin
from lowtide.evaluation.metrics.images import enough
from lowtide.evaluation.metrics.statistics import Statistics, frechet

OURS = Origin()


@dataclass(frozen=True)
class Scored:
    """A metric's value, what resampling the images makes of it, and where both come from."""

    value: float
    resamples: np.ndarray
    origin: Origin


@dataclass(frozen=True)
class Case:
    """What is measured; the networks look only when a metric asks, and once."""

    images: np.ndarray
    reference: np.ndarray | Statistics | None
    asked: str | Extractor
    prompts: tuple[str, ...]
    counts: np.ndarray

    @cached_property
    def extractor(self) -> Extractor:
        return load_extractor(self.asked) if isinstance(self.asked, str) else self.asked

    @cached_property
    def features(self) -> Features:
        return self.extractor(self.images)

    @cached_property
    def reference_features(self) -> Features:
        return self.extractor(self.other)

    @property
    def other(self) -> np.ndarray:
        """The reference images."""
        if not isinstance(self.reference, np.ndarray):
            kind = "no reference" if self.reference is None else "a reference of statistics alone"
            raise BadInput(
                f"found {kind}", "reference images for this metric", "pass the images themselves"
            )
        return self.reference

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        if len(self.other) != len(self.images):
            found = f"found {len(self.images)} images and {len(self.other)} of the reference"
            raise BadInput(
                found, "one reference image for each seed", "sample both from the same seeds"
            )
        return self.images, self.other

    def sums(self, layer: str) -> Statistics:
        """The reference as statistics."""
        if isinstance(self.reference, Statistics):
            return self.reference
        return self.counted(self.reference_features, layer)

    def counted(self, features: Features, layer: str) -> Statistics:
        size = self.images.shape[1:3]
        return Statistics.of(features.layer(layer), source=self.extractor.source(layer), size=size)

    def each(self, values: np.ndarray, origin: Origin = OURS) -> Scored:
        return Scored(float(values.mean()), intervals.means(values, self.counts), origin)


def psnr(case: Case) -> Scored:
    return case.each(pairs.each_psnr(*case.pair))


def ssim(case: Case) -> Scored:
    return case.each(pairs.each_ssim(*case.pair))


def perceived(case: Case) -> Scored:
    net, origin = lpips.load()
    return case.each(lpips.each_lpips(net, *case.pair), origin)


def fd(case: Case, layer: str = "pooled") -> Scored:
    """Statistics are enough of a reference."""
    reference = case.sums(layer)
    for n, whose in ((len(case.images), "the images"), (reference.n, "the reference's images")):
        enough(n, 2, f"{whose} that a Fréchet distance compares")
    value = frechet(case.counted(case.features, layer), reference)
    resamples = intervals.frechets(case.features.layer(layer), reference, case.counts)
    return Scored(value, resamples, case.extractor.origin)


def sfd(case: Case) -> Scored:
    return fd(case, "spatial")


def kd(case: Case) -> Scored:
    ours, reference = case.features.pooled, case.reference_features.pooled
    value = sets.kernel_distance(ours, reference)
    return Scored(
        value, intervals.kernel_distances(ours, reference, case.counts), case.extractor.origin
    )


def precision(case: Case) -> Scored:
    return case.each(
        sets.covered(case.features.pooled, case.reference_features.pooled).astype(float),
        case.extractor.origin,
    )


def recall(case: Case) -> Scored:
    ours, reference = case.features.pooled, case.reference_features.pooled
    value = sets.recall(ours, reference)
    return Scored(value, intervals.recalls(ours, reference, case.counts), case.extractor.origin)


def inception_score(case: Case) -> Scored:
    logits = case.features.layer("logits")
    value = sets.inception_score(logits)
    return Scored(value, intervals.inception_scores(logits, case.counts), case.extractor.origin)


def clip(case: Case) -> Scored:
    """Reads with CLIP whatever extractor was asked for the other metrics."""
    extractor = (
        case.extractor
        if isinstance(case.asked, Extractor) and case.asked.name == "clip"
        else load_extractor("clip")
    )
    if len(case.prompts) != len(case.images):
        found = f"found {len(case.prompts)} prompts for {len(case.images)} images"
        raise BadInput(found, "one prompt for each image", "pass `prompts`")
    texts = vision_transformer.read_prompts(extractor, case.prompts)
    return case.each(sets.clip_scores(extractor(case.images).pooled, texts), extractor.origin)


@dataclass(frozen=True)
class Metric:
    """How a metric is scored, which way is better, between which ends it lies, and whether its name tells the extractor."""

    score: Callable[[Case], Scored]
    higher_is_better: bool
    ends: tuple[float, float] = (-np.inf, np.inf)
    named_after: bool = False


METRICS = {
    "psnr": Metric(psnr, True),
    "ssim": Metric(ssim, True, (-1, 1)),
    "lpips": Metric(perceived, False, (0, np.inf)),
    "fd": Metric(fd, False, (0, np.inf), True),
    "sfd": Metric(sfd, False, (0, np.inf), True),
    "kd": Metric(kd, False, named_after=True),
    "precision": Metric(precision, True, (0, 1)),
    "recall": Metric(recall, True, (0, 1)),
    "is": Metric(inception_score, True, (1, np.inf), True),
    "clip": Metric(clip, True, (0, 100)),
}
