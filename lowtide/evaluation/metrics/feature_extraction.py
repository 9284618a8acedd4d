"""Features of images: the extractor network, its outputs, and the origin of a number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowtide.errors import BadInput
from lowtide.evaluation.metrics.image_checks import checked_images
from lowtide.evaluation.metrics.statistics import Statistics, added
from lowtide.machine.devices import CPU

BATCH = 32
# sFID reads the first seven maps of a middle layer (Nash et al. 2021); all networks here do so.
SPATIAL_MAPS = 7


@dataclass(frozen=True)
class Origin:
    """How a number was computed: the program, the hash of the weights, the resize."""

    backend: str = "lowtide"
    weights: str | None = None
    resize: str = "none"


@dataclass(frozen=True)
class ImageFeatures:
    """Features of N images; networks without a spatial layer or class logits have None there.

    pooled: (N, features). spatial: (N, 7 x height x width of the maps). logits: (N, classes).
    """

    pooled: np.ndarray
    spatial: np.ndarray | None = None
    logits: np.ndarray | None = None

    def layer(self, name: str) -> np.ndarray:
        """The features of one layer, which the network must have."""
        layers = {"pooled": self.pooled, "spatial": self.spatial, "logits": self.logits}
        features = layers[name]
        if features is None:
            wrong = f"found an extractor without {name} features"
            raise BadInput(wrong, "one that has them", "choose inception or efficientnet")
        return features


@dataclass(frozen=True)
class Extractor:
    """A feature extractor.

    The net is called with images of shape (N, 3, height, width) in [0, 1] and returns the tensors
    (pooled, spatial or None, logits or None).
    """

    name: str
    net: nn.Module
    origin: Origin

    def __call__(self, images: np.ndarray) -> ImageFeatures:
        """Features of checked images of shape (N, height, width, channels), batch by batch."""
        starts = range(0, len(images), BATCH)
        batches = [self._batch_features(images[start : start + BATCH]) for start in starts]
        pooled, spatial, logits = zip(*batches, strict=True)
        return ImageFeatures(np.concatenate(pooled), _joined(spatial), _joined(logits))

    def on(self, device: torch.device) -> "Extractor":
        """The same extractor, whose net computes on this device from here on."""
        self.net.to(device)
        return self

    @property
    def device(self) -> torch.device:
        """Where the net computes: the CPU, if it has no parameters."""
        return next((each.device for each in self.net.parameters()), CPU)

    @torch.no_grad()
    def _batch_features(
        self, images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
        pooled, spatial, logits = self.net(pixels(images).to(self.device))
        return pooled.float().cpu().numpy(), _array(spatial), _array(logits)

    def source(self, layer: str = "pooled") -> str:
        return f"{self.name} {layer} {self.origin.weights}"

    def statistics(self, batches: Iterable[np.ndarray], *, layer: str = "pooled") -> Statistics:
        """Sums over batches of images, which are not kept; layer: pooled or spatial."""
        return added(self._batch_statistics(checked_images(batch), layer) for batch in batches)

    def _batch_statistics(self, images: np.ndarray, layer: str) -> Statistics:
        features = self(images).layer(layer)
        return Statistics.of(features, source=self.source(layer), size=image_size(images))


def _array(part: Tensor | None) -> np.ndarray | None:
    return None if part is None else part.float().cpu().numpy()


def _joined(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    arrays = [part for part in parts if part is not None]
    return np.concatenate(arrays) if arrays else None


def image_size(images: np.ndarray) -> tuple[int, int]:
    """The height and the width of images of shape (N, height, width, channels)."""
    _, height, width, _ = images.shape
    return height, width


def pixels(images: np.ndarray) -> Tensor:
    """Images rounded to 8 bits, as FID does: an image in memory and its PNG give one number."""
    return (channels_first(images) * 255).round() / 255


def channels_first(images: np.ndarray) -> Tensor:
    """Images of shape (N, 3, height, width) for a network; a grey channel is repeated."""
    clamped = torch.from_numpy(np.ascontiguousarray(images)).float().clamp(0, 1)
    return clamped.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


def resized(x: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)


def centre(x: Tensor, size: int) -> Tensor:
    """The central square, after a resize of the shorter side to `size`."""
    height, width = x.shape[-2:]
    scale = size / min(height, width)
    x = resized(x, max(size, round(height * scale)), max(size, round(width * scale)))
    top = (x.shape[-2] - size) // 2
    left = (x.shape[-1] - size) // 2
    return x[..., top : top + size, left : left + size]
