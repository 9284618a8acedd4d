"""How far a quantized model's images are from the float model's, and from real ones.

`measure` is the whole in one call; the metrics themselves are plain functions of arrays in pairs.py, sets.py and
statistics.py.
"""

from lowtide.metrics.extractors import EXTRACTORS, load_extractor
from lowtide.metrics.features import Extractor, Features, Origin
from lowtide.metrics.measure import Measured, measure, measure_latents, per_image
from lowtide.metrics.pairs import psnr, ssim
from lowtide.metrics.statistics import Statistics, frechet

__all__ = [
    "EXTRACTORS", "Extractor", "Features", "Measured", "Origin", "Statistics", "frechet", "load_extractor", "measure",
    "measure_latents", "per_image", "psnr", "ssim",
]  # fmt: skip
