"""LPIPS (Zhang et al. 2018): how different two images look to AlexNet, weighted as people judged."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import BATCH, Origin, channels_first

BACKBONE, HEADS = "alexnet-owt-7be5be79.pth", "alex.pth"
# AlexNet's convolutions (inputs, outputs, kernel, stride, padding), and which come after a pooling.
CONVOLUTIONS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
POOLED = (1, 2)
# Their places in torchvision's Sequential, which names the weights.
PLACES = (0, 3, 6, 8, 10)
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# Three poolings' worth of strides: below this nothing is left.
SMALLEST = 31


class LPIPS(nn.Module):
    """Images in [0, 1] and their references in, one distance for each out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(*shape) for shape in CONVOLUTIONS)
        self.heads = nn.ModuleList(nn.Conv2d(shape[1], 1, 1, bias=False) for shape in CONVOLUTIONS)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        seen = zip(self.heads, self.maps(images), self.maps(reference), strict=True)
        return sum(head((ours - theirs) ** 2).mean((1, 2, 3)) for head, ours, theirs in seen)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Every layer's answer, of length one at every pixel."""
        shift, scale = (torch.tensor(each)[:, None, None] for each in (SHIFT, SCALE))
        x, found = (2 * images - 1 - shift) / scale, []
        for place, layer in enumerate(self.layers):
            x = torch.relu(layer(nn.functional.max_pool2d(x, 3, 2) if place in POOLED else x))
            found.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return found


def load(
    backbone: str | Path | None = None, heads: str | Path | None = None
) -> tuple[LPIPS, Origin]:
    """LPIPS from torchvision's AlexNet and the heads that torchmetrics ships, given or found in the cache."""
    trunk = pretrained.found(
        "lpips' AlexNet (torchvision's)", BACKBONE, backbone, [pretrained.hub_cache() / BACKBONE]
    )
    judge = pretrained.found(
        "lpips' heads (pip install 'lowtide[metrics]' brings them)", HEADS, heads, packaged()
    )
    net = LPIPS()
    net.load_state_dict(named(pretrained.read(trunk), pretrained.read(judge)))
    hashes = f"{pretrained.file_hash(trunk)} {pretrained.file_hash(judge)}"
    return net.eval().requires_grad_(False), Origin("lowtide, LPIPS 0.1 AlexNet", hashes)


def packaged() -> list[Path]:
    """torchmetrics has the heads; found without importing it, which takes seconds."""
    spec = find_spec("torchmetrics")
    places = spec.submodule_search_locations if spec else ()
    return [Path(place) / "functional" / "image" / "lpips_models" / HEADS for place in places]


def named(trunk: pretrained.State, heads: pretrained.State) -> pretrained.State:
    """The two files' tensors under this module's names."""
    kinds = ("weight", "bias")
    try:
        layers = {
            f"layers.{n}.{kind}": trunk[f"features.{place}.{kind}"]
            for n, place in enumerate(PLACES)
            for kind in kinds
        }
        return layers | {
            f"heads.{n}.weight": heads[f"lin{n}.model.1.weight"] for n in range(len(PLACES))
        }
    except KeyError as wrong:
        raise BadInput(
            f"found LPIPS weights without {wrong}",
            "AlexNet and LPIPS 0.1 heads",
            "fetch the files again",
        ) from wrong


@torch.no_grad()
def each_lpips(net: LPIPS, images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The distance of every image to its reference."""
    if min(images.shape[1:3]) < SMALLEST:
        found = f"found images of {images.shape[1]} x {images.shape[2]}"
        raise BadInput(found, f"at least {SMALLEST} x {SMALLEST} for LPIPS", "leave lpips out")
    ours, theirs = (channels_first(each).split(BATCH) for each in (images, reference))
    return torch.cat([net(*pair) for pair in zip(ours, theirs, strict=True)]).double().numpy()
