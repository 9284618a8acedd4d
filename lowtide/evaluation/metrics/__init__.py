"""How far a quantized model's images are from the float model's, and from real ones.

`measure` is the whole in one call; the metrics themselves are plain functions of arrays in pairs.py, sets.py and
statistics.py.
"""

from lowtide.evaluation.metrics.extractors import EXTRACTORS, load_extractor
from lowtide.evaluation.metrics.feature_extraction import Extractor, Features, Origin
from lowtide.evaluation.metrics.measure import Measured, measure, measure_latents, per_image
from lowtide.evaluation.metrics.pairs import psnr, ssim
from lowtide.evaluation.metrics.statistics import Statistics, frechet

__all__ = [
    "EXTRACTORS", "Extractor", "Features", "Measured", "Origin", "Statistics", "frechet", "load_extractor", "measure",
    "measure_latents", "per_image", "psnr", "ssim",
]  # fmt: skip
