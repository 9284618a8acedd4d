"""Scores: each model's images are measured against the reference's images and a data set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lowtide.evaluation.compared_models import ComparedModel
from lowtide.evaluation.gates import GATES
from lowtide.evaluation.metrics import (
    Extractor,
    Measurement,
    Statistics,
    load_extractor,
    lpips,
    measure,
    measure_latents,
    per_image,
)
from lowtide.evaluation.metrics.metric_names import extractor_of, full_name, plain_name
from lowtide.evaluation.reference_dataset import check_dataset, check_statistics, load_dataset
from lowtide.evaluation.timed_sampling import ModelSamples
from lowtide.machine.devices import CPU, chosen
from lowtide.settings import EvaluationSettings

# Metrics of image pairs, and those that need no reference at all; the others need a data set.
PAIRS = ("psnr", "ssim", "lpips")
WITHOUT_REFERENCE = ("is", "clip")
LATENT = "latent_mse"
DEFAULT_EXTRACTOR = "efficientnet"
SSIM_WINDOW = 11


@dataclass(frozen=True)
class MeasurementPlan:
    """What is measured, and with what.

    metrics: plain names. extractor: loaded if a metric needs it, else its name. limits: of the
    gates. explicit: the user named the metrics; if not, metrics that do not fit are left out.
    device: where the networks of metrics compute.
    """

    metrics: tuple[str, ...]
    extractor: Extractor | str
    dataset: Path | None
    limits: Mapping[str, float]
    explicit: bool
    device: torch.device = CPU

    def pair_metrics(self) -> list[str]:
        return [name for name in self.metrics if name in PAIRS]

    def set_metrics(self) -> list[str]:
        """Metrics of a model's images alone or against the data set."""
        return [name for name in self.metrics if name not in (*PAIRS, LATENT)]

    def full_name(self, metric: str) -> str:
        """The name of a metric in evidence.json."""
        extractor = self.extractor
        return full_name(metric, extractor if isinstance(extractor, str) else extractor.name)


@dataclass(frozen=True)
class ModelScores:
    """The metrics of one model by their full names, and the values of each image."""

    metrics: dict[str, Measurement]
    per_image: dict[str, list[float]]


def measurement_plan(settings: EvaluationSettings) -> MeasurementPlan:
    """The plan for these settings; wrong settings are an error here, before hours of sampling."""
    device = chosen(settings.device)
    requested = _requested_metrics(settings)
    network = next(filter(None, map(extractor_of, requested)), DEFAULT_EXTRACTOR)
    plain_names = [name if name == LATENT else plain_name(name, network) for name in requested]
    metrics = tuple(dict.fromkeys(plain_names))
    others = (*PAIRS, *WITHOUT_REFERENCE, LATENT)
    dataset_metrics = [name for name in metrics if name not in others]
    dataset = None if settings.dataset is None else Path(settings.dataset)
    check_dataset(dataset_metrics, dataset)
    if "lpips" in metrics:
        lpips.load()
    needs_extractor = bool(dataset_metrics) or "is" in metrics
    extractor = load_extractor(network).on(device) if needs_extractor else network
    if dataset and dataset.is_file() and isinstance(extractor, Extractor):
        check_statistics(dataset_metrics, Statistics.load(dataset), extractor)
    return MeasurementPlan(
        metrics=metrics,
        extractor=extractor,
        dataset=dataset,
        limits=settings.limits,
        explicit=settings.metrics is not None,
        device=device,
    )


def _requested_metrics(settings: EvaluationSettings) -> list[str]:
    """The metrics of the settings, or the default ones, and those that gates need."""
    default = ("psnr", "ssim", LATENT) + (("fd",) if settings.dataset else ())
    named = default if settings.metrics is None else settings.metrics
    return [*named, *(GATES[gate].metric for gate in settings.limits)]


def model_scores(
    plan: MeasurementPlan,
    models: Sequence[ComparedModel],
    samples: Mapping[str, ModelSamples],
    seeds: Sequence[int],
    captions: Sequence[str] | None,
) -> dict[str, ModelScores]:
    """The scores of each model by key. The first model is the reference."""
    images = {key: np.concatenate(each.images) for key, each in samples.items()}
    reference, *others = models
    target = images[reference.key]
    dataset = load_dataset(plan.dataset, target)
    scores = {reference.key: ModelScores(_set_scores(plan, target, dataset, seeds, captions), {})}
    for model in others:
        own = images[model.key]
        pairs = _pair_scores(plan, own, target, seeds)
        latents = _latent_scores(plan, model, samples, reference.key, seeds)
        sets = _set_scores(plan, own, dataset, seeds, captions)
        values = per_image(own, target, list(pairs))
        scores[model.key] = ModelScores(
            metrics=pairs | latents | sets,
            per_image={name: each.tolist() for name, each in values.items()},
        )
    return scores


def _set_scores(
    plan: MeasurementPlan,
    images: np.ndarray,
    dataset: Statistics | np.ndarray | None,
    seeds: Sequence[int],
    captions: Sequence[str] | None,
) -> dict[str, Measurement]:
    return measure(
        images,
        dataset,
        plan.set_metrics(),
        seeds=seeds,
        extractor=plan.extractor,
        prompts=captions or (),
        device=plan.device,
    )


def _pair_scores(
    plan: MeasurementPlan, images: np.ndarray, reference: np.ndarray, seeds: Sequence[int]
) -> dict[str, Measurement]:
    """Image by image. SSIM is left out of images below its window, unless the user named it."""
    names = plan.pair_metrics()
    if not plan.explicit and min(images.shape[1:3]) < SSIM_WINDOW:
        names = [name for name in names if name != "ssim"]
    return measure(
        images, reference, names, seeds=seeds, extractor=plan.extractor, device=plan.device
    )


def _latent_scores(
    plan: MeasurementPlan,
    model: ComparedModel,
    samples: Mapping[str, ModelSamples],
    reference: str,
    seeds: Sequence[int],
) -> dict[str, Measurement]:
    """The error of latents; without a decoder the latents are the images, and add nothing."""
    has_decoder = any(getattr(model.pipe, name, None) is not None for name in ("vae", "vqvae"))
    if LATENT not in plan.metrics or not (has_decoder or plan.explicit):
        return {}
    own = np.concatenate(samples[model.key].latents)
    theirs = np.concatenate(samples[reference].latents)
    return {LATENT: measure_latents(own, theirs, seeds=seeds)}
