"""Checks of images before a metric: (N, height, width, channels), floats in [0, 1], one size."""

from collections.abc import Sequence

import numpy as np

from lowtide.errors import BadInput

# The last clamp of a decoder may exceed [0, 1] by a rounding error.
TOLERANCE = 1e-4


def checked_images(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """The images as one array of shape (N, height, width, channels); bad images are an error."""
    batch = _stacked(images)
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        wrong = f"found images of shape {batch.shape}"
        raise BadInput(wrong, "N x height x width x 1 or 3", "put the channels last")
    if not np.issubdtype(batch.dtype, np.floating):
        way_out = "divide by the largest value, 255 for 8 bits"
        raise BadInput(f"found {batch.dtype} images", "floats in [0, 1]", way_out)
    if not np.isfinite(batch).all():
        wrong = f"found NaN or infinity in {_not_finite(batch)}"
        raise BadInput(wrong, "finite images", "check the model that made them")
    if len(batch) and (batch.min() < -TOLERANCE or batch.max() > 1 + TOLERANCE):
        wrong = f"found values from {batch.min():.3g} to {batch.max():.3g}"
        raise BadInput(wrong, "images in [0, 1]", "scale and clamp them")
    return batch


def _stacked(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    sizes = {np.shape(image) for image in images}
    if len(sizes) > 1:
        examples = " and ".join(" x ".join(map(str, size)) for size in sorted(sizes)[:2])
        way_out = "measure each size separately, or resize the images first"
        raise BadInput(f"found images of {examples}", "one size", way_out)
    return np.asarray(images)


def _not_finite(batch: np.ndarray) -> str:
    places = np.flatnonzero(~np.isfinite(batch).reshape(len(batch), -1).all(1))
    return f"{len(places)} of {len(batch)} images, first at place {places[0]}"


def check_same_size(images: np.ndarray, height: int, width: int) -> None:
    """Both sides have one resolution: a resize of one side would be measured as an error."""
    if images.shape[1:3] != (height, width):
        own = f"{images.shape[1]} x {images.shape[2]}"
        wrong = f"found images of {own} and a reference of {height} x {width}"
        raise BadInput(wrong, "one resolution", "use a reference of the images' own size")


def check_count(count: int, least: int, what: str) -> None:
    if count < least:
        raise BadInput(f"found {count} of {what}", f"at least {least}", "sample more seeds")
