"""What a network sees in images: the extractor, its features, and where its numbers come from."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowtide.errors import BadInput
from lowtide.evaluation.metrics.images import checked
from lowtide.evaluation.metrics.statistics import Statistics, added

BATCH = 32
# sFID looks at the first seven maps of a layer halfway (Nash et al. 2021); the same number here for every network.
SPATIAL_MAPS = 7


@dataclass(frozen=True)
class Origin:
    """How a number came about: the program, the hash of the weights, the resize."""

    backend: str = "lowtide"
    weights: str | None = None
    resize: str = "none"


@dataclass(frozen=True)
class Features:
    """Of N images: pooled features, and, where the network has them, maps from halfway and class logits."""

    pooled: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None

    def layer(self, name: str) -> np.ndarray:
        """One of them, which must be there."""
        layers = {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}
        if layers[name] is None:
            raise BadInput(
                f"found an extractor without {name} features",
                "one that has them",
                "choose inception or efficientnet",
            )
        return layers[name]


@dataclass(frozen=True)
class Extractor:
    """A network called with N x 3 x height x width in [0, 1], which answers (pooled, spatial or None, logits or None)."""

    name: str
    net: nn.Module
    origin: Origin

    def __call__(self, images: np.ndarray) -> Features:
        """Features of good images, in pieces."""
        pieces = [self.see(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return Features(
            *(
                None if parts[0] is None else np.concatenate(parts)
                for parts in zip(*pieces, strict=True)
            )
        )

    @torch.no_grad()
    def see(self, images: np.ndarray) -> list[np.ndarray | None]:
        return [None if part is None else part.float().numpy() for part in self.net(pixels(images))]

    def source(self, layer: str = "pooled") -> str:
        return f"{self.name} {layer} {self.origin.weights}"

    def statistics(self, batches: Iterable[np.ndarray], *, layer: str = "pooled") -> Statistics:
        """Sums over batches of images, each forgotten when it is counted; layer: pooled or spatial."""
        return added(self.one_statistics(checked(batch), layer) for batch in batches)

    def one_statistics(self, images: np.ndarray, layer: str) -> Statistics:
        features = self(images).layer(layer)
        return Statistics.of(features, source=self.source(layer), size=images.shape[1:3])


def pixels(images: np.ndarray) -> Tensor:
    """Rounded to 8 bits, as FID has it: an image in memory and its PNG then give one number."""
    return (channels_first(images) * 255).round() / 255


def channels_first(images: np.ndarray) -> Tensor:
    """For a network: three channels, grey ones repeated."""
    return (
        torch.from_numpy(np.ascontiguousarray(images))
        .float()
        .clamp(0, 1)
        .permute(0, 3, 1, 2)
        .expand(-1, 3, -1, -1)
    )


def resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def centre(x: Tensor, size: int) -> Tensor:
    """The shorter side brought to `size`, and the square in the middle."""
    height, width = x.shape[-2:]
    scale = size / min(height, width)
    x = resized(x, max(size, round(height * scale)), max(size, round(width * scale)))
    top, left = (x.shape[-2] - size) // 2, (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]
