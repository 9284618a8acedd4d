"""Tiny feature extractors, and images for them."""

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lowtide.evaluation.metrics import Extractor, Origin

WIDTH = 12
CLASSES = 5


class Squares(nn.Module):
    """Squares of fixed projections of an image of 4 x 4: features of the mean and the spread."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.register_buffer("projection", torch.randn(48, WIDTH, generator=generator))
        self.register_buffer("classifier", torch.randn(WIDTH, CLASSES, generator=generator))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        small = F.adaptive_avg_pool2d(images, 4).flatten(1) - 0.5
        pooled = (small @ self.projection).square()
        return pooled, small, pooled @ self.classifier


def squares(name: str = "squares") -> Extractor:
    return Extractor(name, Squares(), Origin("test", "sha256:0", "mean, 4"))


def images(n: int, seed: int = 0, size: int = 16, channels: int = 3) -> np.ndarray:
    """Random blocks of colour, in 256 levels."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(0, 1, (n, size // 4, size // 4, channels)).repeat(4, 1).repeat(4, 2)
    return np.round((0.8 * blocks + 0.2 * rng.uniform(0, 1, (n, size, size, channels))) * 255) / 255


def noisy(clean: np.ndarray, amount: float, seed: int = 1) -> np.ndarray:
    damaged = clean + amount * np.random.default_rng(seed).standard_normal(clean.shape)
    return np.round(damaged.clip(0, 1) * 255) / 255


def features(n: int, seed: int, width: int = 24, spread: float = 1.0) -> np.ndarray:
    """Correlated float32 features with a mean."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((width, width))
    return (spread * rng.standard_normal((n, width)) @ mix + 0.1 * seed).astype(np.float32)
