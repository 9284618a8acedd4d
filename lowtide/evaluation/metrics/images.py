"""What a metric takes for images: N x height x width x channels, floats in [0, 1], all of one size, no NaN."""

from collections.abc import Sequence

import numpy as np

from lowtide.errors import BadInput

# A decoder's last clamp may round a little past the ends.
SLACK = 1e-4


def checked(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """One array of good images, or a sentence that says what is wrong with them."""
    batch = stacked(images)
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3):
        raise BadInput(
            f"found images of shape {batch.shape}",
            "N x height x width x 1 or 3",
            "put the channels last",
        )
    if not np.issubdtype(batch.dtype, np.floating):
        raise BadInput(
            f"found {batch.dtype} images",
            "floats in [0, 1]",
            "divide by the largest value, 255 for 8 bits",
        )
    if not np.isfinite(batch).all():
        raise BadInput(
            f"found NaN or infinity in {spoilt(batch)}",
            "finite images",
            "look at the model that drew them",
        )
    if len(batch) and (batch.min() < -SLACK or batch.max() > 1 + SLACK):
        found = f"found values from {batch.min():.3g} to {batch.max():.3g}"
        raise BadInput(found, "images in [0, 1]", "scale and clamp them")
    return batch


def stacked(images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    sizes = {np.shape(image) for image in images}
    if len(sizes) > 1:
        told = " and ".join(" x ".join(map(str, size)) for size in sorted(sizes)[:2])
        raise BadInput(
            f"found images of {told}",
            "one size",
            "measure each size by itself, or resize them first",
        )
    return np.asarray(images)


def spoilt(batch: np.ndarray) -> str:
    places = np.flatnonzero(~np.isfinite(batch).reshape(len(batch), -1).all(1))
    return f"{len(places)} of {len(batch)} images, first at place {places[0]}"


def same_size(images: np.ndarray, height: int, width: int) -> None:
    """Both sides of a comparison have one resolution: resizing one would be measured as damage."""
    if images.shape[1:3] != (height, width):
        found = f"found images of {images.shape[1]} x {images.shape[2]} and a reference of {height} x {width}"
        raise BadInput(found, "one resolution", "take a reference of the images' own size")


def enough(found: int, needed: int, what: str) -> None:
    if found < needed:
        raise BadInput(f"found {found} of {what}", f"at least {needed}", "sample more seeds")
