"""The data set that images are compared with: a folder of images, or a file of Statistics."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import Extractor, Statistics

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Metrics for which statistics are enough, and the layer of their features.
LAYERS = {"fd": "pooled", "sfd": "spatial"}
# What Pillow raises for a file that is empty, damaged or no image.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def check_dataset(set_metrics: Sequence[str], dataset: Path | None) -> None:
    """Metrics of image sets have a data set, and it can be read; checked before any sampling."""
    if set_metrics and dataset is None:
        raise BadInput(
            f"found {set_metrics[0]} and no data set",
            "images to compare with",
            "give --dataset FOLDER or FILE.npz",
        )
    if dataset is None:
        return
    if not dataset.exists():
        expected = "a folder of images, or statistics in an .npz file"
        raise BadInput(f"found nothing at {dataset}", expected, "check --dataset")
    if dataset.is_file():
        Statistics.load(dataset)
    else:
        _check_images(dataset)


def check_statistics(
    set_metrics: Sequence[str], statistics: Statistics, extractor: Extractor
) -> None:
    """These metrics can be computed from these statistics; checked before any sampling."""
    for metric in set_metrics:
        if metric not in LAYERS:
            wrong = f"found statistics alone for {metric}"
            raise BadInput(wrong, "the images of the data set", "give --dataset FOLDER")
        expected = extractor.source(LAYERS[metric])
        if statistics.source != expected:
            wrong = f"found statistics of {statistics.source or 'unnamed features'} for {metric}"
            raise BadInput(wrong, f"statistics of {expected}", "collect the statistics again")


def _check_images(folder: Path) -> None:
    """Each file is an image, and all have one size; pixels are not decoded."""
    sizes = {_verified_size(file) for file in _image_files(folder)}
    if len(sizes) > 1:
        examples = " and ".join(f"{height} x {width}" for width, height in sorted(sizes)[:2])
        wrong = f"found images of {examples} in {folder.name}"
        raise BadInput(wrong, "one size", "resize the data set")


def _image_files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        expected = ", ".join(sorted(SUFFIXES))
        raise BadInput(f"found no images in {folder}", expected, "check --dataset")
    return files


def _verified_size(file: Path) -> tuple[int, int]:
    """The width and the height of an image whose checksums are right."""
    try:
        with Image.open(file) as image:
            image.verify()
            return image.size
    except _UNREADABLE as error:
        raise _unreadable(file) from error


def _unreadable(file: Path) -> BadInput:
    way_out = "remove it, or copy it again"
    return BadInput(f"found {file}, which is no readable image", "an image file", way_out)


def load_dataset(path: Path | None, images: np.ndarray) -> Statistics | np.ndarray | None:
    """The data set as Statistics, or as images of the shape of `images`; grey if those are.

    images: (N, height, width, channels).
    """
    if path is None:
        return None
    if path.is_file():
        return Statistics.load(path)
    mode = "L" if images.shape[3] == 1 else "RGB"
    dataset = [_decoded(file, mode) for file in _image_files(path)]
    if sizes := {image.shape[:2] for image in dataset} - {images.shape[1:3]}:
        other = " x ".join(map(str, sizes.pop()))
        expected = "x".join(map(str, images.shape[1:3]))
        raise BadInput(f"found images of {other} in {path.name}", expected, "resize the data set")
    return np.stack(dataset).reshape(-1, *images.shape[1:])


def _decoded(file: Path, mode: str) -> np.ndarray:
    try:
        return np.asarray(Image.open(file).convert(mode), dtype=np.float32) / 255
    except _UNREADABLE as error:
        raise _unreadable(file) from error
