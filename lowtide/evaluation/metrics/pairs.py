"""Metrics of image pairs: image k of one model against image k of another."""

import numpy as np

from lowtide.errors import BadInput

# The PSNR in dB that identical images get.
IDENTICAL = 100.0
# The constants of the SSIM paper (Wang et al. 2004): a Gaussian window of 11 x 11 pixels (a reach
# of 5 to each side), values in [0, 1].
REACH = 5
SIGMA = 1.5
C1 = 0.01**2
C2 = 0.03**2


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean peak signal-to-noise ratio in dB of values in [0, 1]; identical images count as 100."""
    return float(each_psnr(images, reference).mean())


def each_psnr(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The peak signal-to-noise ratio of each image: (N,)."""
    with np.errstate(divide="ignore"):
        return np.minimum(-10 * np.log10(latent_mse(images, reference)), IDENTICAL)


def latent_mse(latents: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The mean squared error of each sample, (N,), for latents of shape (N, ...)."""
    error = np.square(latents.astype(np.float64) - reference.astype(np.float64))
    return error.reshape(len(error), -1).mean(1)


def ssim(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean structural similarity; 1 for identical images."""
    return float(each_ssim(images, reference).mean())


def each_ssim(images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The structural similarity of each image: (N,).

    The mean is over all pixels; images are mirrored at their edges (as in torchmetrics).
    """
    if min(images.shape[1:3]) <= REACH:
        wrong = f"found images of {images.shape[1]} x {images.shape[2]}"
        raise BadInput(wrong, f"at least {REACH + 1} x {REACH + 1} for SSIM", "leave ssim out")
    pairs = zip(images.astype(np.float64), reference.astype(np.float64), strict=True)
    return np.array([_similarity(x, y) for x, y in pairs])


def _similarity(x: np.ndarray, y: np.ndarray) -> float:
    """SSIM of two images of shape (height, width, channels)."""
    mean_x = _smooth(x)
    mean_y = _smooth(y)
    variance_x = np.maximum(_smooth(x * x) - mean_x**2, 0)
    variance_y = np.maximum(_smooth(y * y) - mean_y**2, 0)
    covariance = _smooth(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return float((luminance * structure).mean())


def _smooth(image: np.ndarray) -> np.ndarray:
    """The Gaussian mean around each pixel: along the height first, then along the width."""
    height, width = image.shape[:2]
    weights = list(enumerate(_gaussian()))
    zero = np.zeros(())
    image = np.pad(image, ((REACH, REACH), (REACH, REACH), (0, 0)), mode="reflect")
    image = sum((weight * image[start : start + height] for start, weight in weights), start=zero)
    return sum((weight * image[:, start : start + width] for start, weight in weights), start=zero)


def _gaussian() -> np.ndarray:
    weights = np.exp(-np.square(np.arange(-REACH, REACH + 1)) / (2 * SIGMA**2))
    return weights / weights.sum()
