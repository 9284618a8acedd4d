"""Which images make up a training batch; everything random comes from one generator."""

from collections.abc import Sized

import torch
import torch.nn.functional as F
from torch import Tensor

from training.phases import TrainingPhase


def device() -> torch.device:
    """Where training runs: a CUDA GPU if there is one. The training data lies there too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_indices(items: Sized, generator: torch.Generator, batch: int) -> Tensor:
    """The indices of one batch, drawn with replacement: (batch,)."""
    return torch.randint(len(items), (batch,), generator=generator, device=generator.device)


def random_typical_indices(
    ranked: Tensor,
    generator: torch.Generator,
    batch: int,
    phase: TrainingPhase,
) -> Tensor:
    """The indices of one batch among the share of images that the phase learns from: (batch,).

    ranked: all indices, most typical first. Where the phase learns from all images, the data's own
    order replaces it.
    """
    if phase.typical < 1:
        candidates = ranked[: int(phase.typical * len(ranked))]
    else:
        candidates = torch.arange(len(ranked), device=generator.device)
    return candidates[random_indices(candidates, generator, batch)]


def random_flags(probability: float, generator: torch.Generator, batch: int) -> Tensor:
    """One random decision per image, such as a flip or a dropped condition: (batch,), bool."""
    return torch.rand(batch, generator=generator, device=generator.device) < probability


def typical_first(images: Tensor, labels: Tensor, neighbours: int = 50) -> Tensor:
    """The indices of all images, the most typical of each class first, the classes interleaved.

    An image is typical if its mean distance to its nearest neighbours of the same class is small.
    The distance is taken at half the resolution and between images scaled to the same norm, so that
    thin strokes count as much as thick ones.

    images: (n, channels, height, width); labels: (n,); result: (n,).
    """
    features = F.normalize(F.avg_pool2d(images.float(), 2).flatten(1), dim=1)
    rank = torch.empty(len(images), device=images.device)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        distance = _neighbour_distance(features[members], neighbours)
        rank[members] = distance.argsort().argsort() / len(members)
    return rank.argsort(stable=True)


def _neighbour_distance(features: Tensor, neighbours: int) -> Tensor:
    """The mean distance of each row to its nearest other rows: (n,)."""
    count = min(neighbours + 1, len(features))
    nearest = []
    for part in features.split(1000):
        distances = torch.cdist(part, features).topk(count, largest=False).values
        # The smallest distance is that of a row to itself.
        nearest.append(distances[:, 1:])
    return torch.cat(nearest).mean(1)
