"""Same-seed comparisons: image k of one model against image k of another."""

import numpy as np

from lowtide.errors import BadInput

IDENTICAL = 100.0
# The constants of the SSIM paper (Wang et al. 2004): a Gaussian window of 11 x 11 pixels, values in [0, 1].
REACH, SIGMA = 5, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, values in [0, 1]; identical images count as 100."""
    return float(each_psnr(images, reference).mean())


def each_psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of every image."""
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(latent_mse(images, reference)), IDENTICAL)


def latent_mse(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The mean squared difference of every sample, of whatever shape a latent has."""
    error = np.square(latents.astype(np.float64) - reference.astype(np.float64))
    return error.reshape(len(error), -1).mean(1)


def ssim(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity; 1 for identical images."""
    return float(each_ssim(images, reference).mean())


def each_ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The structural similarity of every image, over all pixels of the image mirrored at its edges (as torchmetrics)."""
    if min(images.shape[1:3]) <= REACH:
        found = f"found images of {images.shape[1]} x {images.shape[2]}"
        raise BadInput(found, f"at least {REACH + 1} x {REACH + 1} for SSIM", "leave ssim out")
    return np.array(
        [
            similarity(*pair)
            for pair in zip(images.astype(np.float64), reference.astype(np.float64), strict=True)
        ]
    )


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two images, height x width x channels."""
    mean_x, mean_y = smooth(x), smooth(y)
    variance_x = np.maximum(smooth(x * x) - mean_x**2, 0)
    variance_y = np.maximum(smooth(y * y) - mean_y**2, 0)
    shared = smooth(x * y) - mean_x * mean_y
    light = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * shared + C2) / (variance_x + variance_y + C2)
    return float((light * structure).mean())


def smooth(image: np.ndarray) -> np.ndarray:
    """The Gaussian mean around every pixel, rows first, then columns."""
    height, width = image.shape[:2]
    image = np.pad(image, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="reflect")
    image = sum(weight * image[start : start + height] for start, weight in enumerate(gaussian()))
    return sum(weight * image[:, start : start + width] for start, weight in enumerate(gaussian()))


def gaussian() -> np.ndarray:
    weights = np.exp(-np.square(np.arange(-REACH, REACH + 1)) / (2 * SIGMA**2))
    return weights / weights.sum()
