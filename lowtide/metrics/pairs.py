"""Same-seed comparisons: image k of one model against image k of another."""

import numpy as np

IDENTICAL = 100.0


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Mean over images of the peak signal-to-noise ratio in dB, values in [0, 1]; identical images count as 100."""
    error = np.square(images.astype(np.float64) - reference.astype(np.float64)).reshape(len(images), -1).mean(1)
    with np.errstate(divide="ignore"):
        return float(np.minimum(-10 * np.log10(error), IDENTICAL).mean())
