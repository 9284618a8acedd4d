"""Scores: every model's images measured against the reference's and against a data set; and gates, the bounds to keep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lowtide.errors import BadInput
from lowtide.evaluation.compared_models import Subject
from lowtide.evaluation.metrics import (
    EXTRACTORS,
    Extractor,
    Statistics,
    load_extractor,
    lpips,
    measure,
    measure_latents,
    per_image,
)
from lowtide.evaluation.metrics.metric_definitions import METRICS
from lowtide.evaluation.metrics.metric_names import names_with as offered, plain_name, full_name as title
from lowtide.evaluation.timed_sampling import Drawing

PAIRS, ALONE, LATENT, DEFAULT = (
    ("psnr", "ssim", "lpips"),
    ("is", "clip"),
    "latent_mse",
    "efficientnet",
)
SSIM_WINDOW = 11
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Json = dict[str, Any]


@dataclass(frozen=True)
class Gate:
    """A bound on a metric: at least, or at most, or at most so much more than the reference has."""

    metric: str
    least: bool = False
    increase: bool = False


GATES = {
    "min-psnr": Gate("psnr", least=True),
    "max-lpips": Gate("lpips"),
    "max-fd-increase": Gate("fd", increase=True),
}


@dataclass(frozen=True)
class Ruler:
    """What is measured and with what: metrics by their plain names, the network that looks (if any must), the data set, gates.

    `asked`: somebody named the metrics; otherwise those that an image is too small for are left out.
    """

    names: tuple[str, ...]
    extractor: Extractor | str
    dataset: Path | None
    gates: Mapping[str, float]
    asked: bool

    def pairs(self) -> list[str]:
        return [name for name in self.names if name in PAIRS]

    def sets(self) -> list[str]:
        """Those that compare with the data set, or look at the images alone."""
        return [name for name in self.names if name not in (*PAIRS, LATENT)]

    def key(self, metric: str) -> str:
        """What evidence calls a metric."""
        return title(
            metric, self.extractor if isinstance(self.extractor, str) else self.extractor.name
        )


def ruler(
    metrics: Sequence[str] | None, dataset: str | Path | None, gates: Mapping[str, float]
) -> Ruler:
    """Everything that can be wrong with what is asked is said here, before hours of drawing."""
    if unknown := [name for name in gates if name not in GATES]:
        raise BadInput(
            f"found gate {unknown[0]!r}", f"one of {', '.join(GATES)}", "check the spelling"
        )
    usual = ("psnr", "ssim", LATENT) + (("fd",) if dataset else ())
    wanted = [*(usual if metrics is None else metrics), *(GATES[gate].metric for gate in gates)]
    who = next(filter(None, map(looker, wanted)), DEFAULT)
    names = tuple(
        dict.fromkeys(name if name == LATENT else plain_name(name, who) for name in wanted)
    )
    sets = [name for name in names if name not in (*PAIRS, *ALONE, LATENT)]
    check_dataset(sets, dataset)
    if "lpips" in names:
        lpips.load()
    loaded = load_extractor(who) if sets or "is" in names else who
    return Ruler(names, loaded, Path(dataset) if dataset else None, gates, metrics is not None)


def looker(name: str) -> str | None:
    """The network that a metric's name tells: fid and its like are Inception's, fd-dinov2 says it at its end."""
    if name in METRICS and name != "is":
        return None
    return next((who for who in EXTRACTORS if name in offered(who)), None)


def check_dataset(sets: Sequence[str], dataset: str | Path | None) -> None:
    if sets and dataset is None:
        raise BadInput(
            f"found {sets[0]} and no data set",
            "images to compare with",
            "give --dataset FOLDER or FILE.npz",
        )
    if dataset is not None and not Path(dataset).exists():
        raise BadInput(
            f"found nothing at {dataset}",
            "a folder of images, or statistics in an .npz file",
            "check --dataset",
        )


def reference_set(path: Path | None, images: np.ndarray) -> Statistics | np.ndarray | None:
    """The data set as statistics or as images, grey if the model's are."""
    if path is None:
        return None
    if path.is_file():
        return Statistics.load(path)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not files:
        raise BadInput(f"found no images in {path}", ", ".join(sorted(PICTURES)), "check --dataset")
    mode = "L" if images.shape[3] == 1 else "RGB"
    found = [np.asarray(Image.open(file).convert(mode), dtype=np.float32) / 255 for file in files]
    if sizes := {image.shape[:2] for image in found} - {images.shape[1:3]}:
        odd = " x ".join(map(str, sizes.pop()))
        raise BadInput(
            f"found images of {odd} in {path.name}",
            "x".join(map(str, images.shape[1:3])),
            "resize the data set",
        )
    return np.stack(found).reshape(-1, *images.shape[1:])


def scored(
    rule: Ruler,
    subjects: Sequence[Subject],
    drawings: Mapping[str, Drawing],
    seeds: Sequence[int],
    captions: list[str] | None,
) -> dict[str, Json]:
    """For each model's key: its metrics, and per-image values of those that have them. The first is the reference."""
    images = {key: np.concatenate(drawing.images) for key, drawing in drawings.items()}
    first = subjects[0].key
    held = reference_set(rule.dataset, images[first])
    found = {}
    for subject in subjects:
        mine, theirs = images[subject.key], None if subject.key == first else images[first]
        told = {"seeds": seeds, "extractor": rule.extractor, "prompts": captions or ()}
        sets = measure(mine, held, rule.sets(), **told)
        pairs = measured_pairs(rule, mine, theirs, seeds) if theirs is not None else {}
        latents = measured_latents(rule, subject, drawings, first, seeds)
        metrics = {name: value.as_json() for name, value in (pairs | latents | sets).items()}
        values = per_image(mine, theirs, list(pairs)) if theirs is not None else {}
        found[subject.key] = {
            "metrics": metrics,
            "per_image": {name: each.tolist() for name, each in values.items()},
        }
    return found


def measured_pairs(
    rule: Ruler, images: np.ndarray, reference: np.ndarray, seeds: Sequence[int]
) -> dict[str, Any]:
    """Seed by seed; SSIM needs a window's size, and is left out of smaller images unless it was asked for."""
    names = rule.pairs()
    if not rule.asked and min(images.shape[1:3]) < SSIM_WINDOW:
        names = [name for name in names if name != "ssim"]
    return measure(images, reference, names, seeds=seeds, extractor=rule.extractor)


def measured_latents(
    rule: Ruler, subject: Subject, drawings: Mapping[str, Drawing], first: str, seeds: Sequence[int]
) -> dict[str, Any]:
    """What a decoder made images of; without one the last sample is the image, and says nothing new."""
    latent = any(getattr(subject.pipe, name, None) is not None for name in ("vae", "vqvae"))
    if subject.key == first or LATENT not in rule.names or not (latent or rule.asked):
        return {}
    mine, theirs = (np.concatenate(drawings[key].latents) for key in (subject.key, first))
    return {LATENT: measure_latents(mine, theirs, seeds=seeds)}


def judged(rule: Ruler, models: Mapping[str, Json], reference: str) -> list[Json]:
    """Every gate for every model but the reference."""
    found = []
    for name, limit in rule.gates.items():
        gate, key = GATES[name], rule.key(GATES[name].metric)
        floor = models[reference]["metrics"][key]["value"] if gate.increase else 0.0
        for model in (model for model in models if model != reference):
            value = models[model]["metrics"][key]["value"] - floor
            passed = value >= limit if gate.least else value <= limit
            found.append(
                {"name": name, "model": model, "limit": limit, "value": value, "passed": passed}
            )
    return found
