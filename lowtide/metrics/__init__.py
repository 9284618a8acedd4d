"""How far a quantized model's images are from the float model's."""

from lowtide.metrics.pairs import psnr

__all__ = ["psnr"]
