"""How far a quantized model's images are from the float model's images, and from real images.

`measure` computes any metrics by name. The metrics themselves are plain functions of arrays in
pairs.py, sets.py and statistics.py.
"""

from lowtide.evaluation.metrics.extractors import EXTRACTORS, load_extractor
from lowtide.evaluation.metrics.feature_extraction import Extractor, ImageFeatures, Origin
from lowtide.evaluation.metrics.measurement import (
    Measurement,
    measure,
    measure_latents,
    per_image,
)
from lowtide.evaluation.metrics.pairs import psnr, ssim
from lowtide.evaluation.metrics.statistics import Statistics, frechet

__all__ = [
    "EXTRACTORS",
    "Extractor",
    "ImageFeatures",
    "Measurement",
    "Origin",
    "Statistics",
    "frechet",
    "load_extractor",
    "measure",
    "measure_latents",
    "per_image",
    "psnr",
    "ssim",
]
