"""LPIPS (Zhang et al. 2018): distance of AlexNet features, weighted to match human judgement."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import BATCH, Origin, channels_first

BACKBONE = "alexnet-owt-7be5be79.pth"
HEADS = "alex.pth"
# AlexNet's convolutions (inputs, outputs, kernel, stride, padding), and those after a pooling.
CONVOLUTIONS = (
    (3, 64, 11, 4, 2),
    (64, 192, 5, 1, 2),
    (192, 384, 3, 1, 1),
    (384, 256, 3, 1, 1),
    (256, 256, 3, 1, 1),
)
POOLED = (1, 2)
# Their indices in torchvision's Sequential, from which the weights have their names.
PLACES = (0, 3, 6, 8, 10)
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# The strides and the poolings leave no pixel of a smaller image.
SMALLEST = 31


class LPIPS(nn.Module):
    """Inputs: images and their references in [0, 1], (N, 3, height, width). Output: (N,)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(*shape) for shape in CONVOLUTIONS)
        self.heads = nn.ModuleList(nn.Conv2d(shape[1], 1, 1, bias=False) for shape in CONVOLUTIONS)

    def forward(self, images: Tensor, reference: Tensor) -> Tensor:
        layers = zip(self.heads, self.maps(images), self.maps(reference), strict=True)
        distances: list[Tensor] = [
            head((ours - theirs) ** 2).mean((1, 2, 3)) for head, ours, theirs in layers
        ]
        first, *rest = distances
        return sum(rest, start=first)

    def maps(self, images: Tensor) -> list[Tensor]:
        """The output of each layer, scaled to unit length at each pixel."""
        shift, scale = (images.new_tensor(channel)[:, None, None] for channel in (SHIFT, SCALE))
        x = (2 * images - 1 - shift) / scale
        maps = []
        for place, layer in enumerate(self.layers):
            x = torch.relu(layer(nn.functional.max_pool2d(x, 3, 2) if place in POOLED else x))
            maps.append(x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt())
        return maps


def load(
    backbone: str | Path | None = None, heads: str | Path | None = None
) -> tuple[LPIPS, Origin]:
    """LPIPS from torchvision's AlexNet and the heads of torchmetrics, from files or the cache."""
    backbone_file = pretrained.weights_file(
        "lpips' AlexNet (torchvision's)", BACKBONE, backbone, [pretrained.hub_cache() / BACKBONE]
    )
    heads_file = pretrained.weights_file(
        "lpips' heads (pip install 'lowtide[metrics]' brings them)", HEADS, heads, _packaged()
    )
    net = LPIPS()
    net.load_state_dict(_renamed(pretrained.read(backbone_file), pretrained.read(heads_file)))
    hashes = f"{pretrained.file_hash(backbone_file)} {pretrained.file_hash(heads_file)}"
    return net.eval().requires_grad_(False), Origin("lowtide, LPIPS 0.1 AlexNet", hashes)


def _packaged() -> list[Path]:
    """Where torchmetrics has the heads."""
    folders = pretrained.package_folders("torchmetrics")
    return [folder / "functional" / "image" / "lpips_models" / HEADS for folder in folders]


def _renamed(backbone: pretrained.State, heads: pretrained.State) -> pretrained.State:
    """The tensors of both files under the names of this module."""
    state = {}
    try:
        for number, place in enumerate(PLACES):
            state[f"layers.{number}.weight"] = backbone[f"features.{place}.weight"]
            state[f"layers.{number}.bias"] = backbone[f"features.{place}.bias"]
        for number in range(len(PLACES)):
            state[f"heads.{number}.weight"] = heads[f"lin{number}.model.1.weight"]
    except KeyError as error:
        wrong = f"found LPIPS weights without {error}"
        raise BadInput(wrong, "AlexNet and LPIPS 0.1 heads", "download the files again") from error
    return state


@torch.no_grad()
def each_lpips(net: LPIPS, images: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The distance of each image to its reference: (N,)."""
    if min(images.shape[1:3]) < SMALLEST:
        wrong = f"found images of {images.shape[1]} x {images.shape[2]}"
        raise BadInput(wrong, f"at least {SMALLEST} x {SMALLEST} for LPIPS", "leave lpips out")
    device = next(net.parameters()).device
    ours = channels_first(images).split(BATCH)
    theirs = channels_first(reference).split(BATCH)
    distances = [
        net(one.to(device), other.to(device)).cpu() for one, other in zip(ours, theirs, strict=True)
    ]
    return torch.cat(distances).double().numpy()
