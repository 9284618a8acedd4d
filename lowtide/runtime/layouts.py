"""Layouts: where the pixels or the tokens of a tensor lie in memory, in strides of elements.

The kernels want channels side by side. So an image batch (B, C, H, W) has its channels innermost,
as tokens (B, L, C) have. All tensors here are on the meta device: shape and strides without data.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Padding:
    """Pixels of zeros around an image."""

    above: int = 0
    left: int = 0
    below: int = 0
    right: int = 0

    def plus(self, other: "Padding") -> "Padding":
        return Padding(
            self.above + other.above,
            self.left + other.left,
            self.below + other.below,
            self.right + other.right,
        )

    def around(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image with this padding."""
        return height + self.above + self.below, width + self.left + self.right

    def within(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image without this padding."""
        return height - self.above - self.below, width - self.left - self.right


NO_PADDING = Padding()


@dataclass(frozen=True)
class Layout:
    """Pixels with their channels side by side: sizes, and strides in elements."""

    batch: int
    height: int
    width: int
    channels: int
    sample: int
    row: int
    column: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def reshaped(self, height: int, width: int) -> "Layout | None":
        """The same pixels in other rows, where one stride reaches them all."""
        if (height, width) == self.size:
            return self
        if height * width != self.pixels:
            return None
        if self.height > 1 and self.width > 1 and self.row != self.width * self.column:
            return None
        column = self.column if self.width > 1 else self.row
        fields = (self.batch, height, width, self.channels)
        return Layout(*fields, self.sample, width * column, column)

    def as_line(self) -> "Layout | None":
        """The same pixels in one row."""
        return self.reshaped(1, self.pixels)


def pixel_shape(
    batch: int, height: int, width: int, channels: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """An image batch (B, C, H, W), channels side by side in memory."""
    shape = (batch, channels, height, width)
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided(shape, strides, dtype=dtype, device="meta")


def pixels_of(meta: Tensor) -> Layout | None:
    """An image batch (B, C, H, W) as pixels; None if its channels are not side by side."""
    if meta.dim() != 4 or not _is_side_by_side(meta, 1):
        return None
    batch, channels, height, width = meta.shape
    sample, _, row, column = meta.stride()
    return Layout(batch, height, width, channels, sample, row, column)


def tokens_of(meta: Tensor) -> Layout | None:
    """Tokens (B, ..., C) as pixels, a row each; None if their channels are not side by side."""
    if meta.dim() < 2 or not _is_side_by_side(meta, -1):
        return None
    if meta.dim() == 2:
        return Layout(meta.shape[0], 1, 1, meta.shape[1], meta.stride(0), 0, 0)
    stride = merged_stride(meta.shape[1:-1], meta.stride()[1:-1])
    if stride is None:
        return None
    count = meta.shape[1:-1].numel()
    return Layout(meta.shape[0], count, 1, meta.shape[-1], meta.stride(0), stride, stride)


def layout_of(meta: Tensor) -> Layout | None:
    """The pixels of an image batch, of tokens, or of a sequence (B, C, L) with channels inside."""
    if meta.dim() == 4:
        return pixels_of(meta)
    return tokens_of(meta.transpose(1, 2) if _is_sequence(meta) else meta)


def channel_axis(meta: Tensor) -> int:
    """The axis of the channels: the one whose elements lie side by side."""
    is_image = meta.dim() == 4 and _is_side_by_side(meta, 1)
    return 1 if is_image or _is_sequence(meta) else meta.dim() - 1


def _is_sequence(meta: Tensor) -> bool:
    """Whether (B, C, L) has its channels, and not its positions, side by side."""
    return meta.dim() == 3 and meta.shape[1] > 1 and meta.stride(1) == 1 and meta.stride(2) != 1


def _is_side_by_side(meta: Tensor, axis: int) -> bool:
    return meta.shape[axis] == 1 or meta.stride(axis) == 1


def merged_stride(sizes: Iterable[int], strides: Iterable[int]) -> int | None:
    """The stride of several axes taken as one; None if there is none."""
    axes = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    if not axes:
        return 0
    for (_, outer), (size, inner) in pairwise(axes):
        if outer != size * inner:
            return None
    return axes[-1][1]


def is_dense(meta: Tensor) -> bool:
    """Whether the elements lie without gaps or repeats, in whatever order of the axes."""
    axes = sorted(zip(meta.stride(), meta.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def dense_like(meta: Tensor) -> Tensor:
    """The same shape and type without gaps, with the channels where `meta` has them."""
    if meta.dim() == 4:
        batch, channels, height, width = meta.shape
        return pixel_shape(batch, height, width, channels, meta.dtype)
    if _is_sequence(meta):
        batch, channels, length = meta.shape
        strides = (channels * length, 1, channels)
        return torch.empty_strided(meta.shape, strides, dtype=meta.dtype, device="meta")
    return torch.empty(meta.shape, dtype=meta.dtype, device="meta")


def same_order(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have their elements in the same order in memory."""
    if one.shape == other.shape:
        axes = zip(one.shape, one.stride(), other.stride(), strict=True)
        return all(size == 1 or first == second for size, first, second in axes)
    return is_dense(one) and is_dense(other) and one.numel() == other.numel()


def vector_over(other: Tensor, like: Tensor) -> Tensor | None:
    """`other` as a vector of each sample (B or 1, C), if it broadcasts over `like` as one.

    `like` is an image batch (B, C, H, W) or tokens (B, ..., C); `other` is (B, C, 1, 1), (C,) or
    (B, 1, C), for example.
    """
    is_wide = other.dtype == torch.float64 or not other.dtype.is_floating_point
    if is_wide or other.dim() > like.dim():
        return None
    channel = channel_axis(like)
    missing = like.dim() - other.dim()
    aligned = other.reshape((1,) * missing + tuple(other.shape)) if missing else other
    samples = aligned.shape[0]
    channels = aligned.shape[channel]
    inner = [size for axis, size in enumerate(aligned.shape) if axis not in (0, channel)]
    broadcasts = samples in (1, like.shape[0]) and all(size == 1 for size in inner)
    if not broadcasts or channels != like.shape[channel] or not _is_side_by_side(aligned, channel):
        return None
    # A matrix added to a matrix of the same shape is a residual.
    if like.dim() == 2 and samples == like.shape[0] > 1:
        return None
    strides = (aligned.stride(0), 1)
    return torch.as_strided(other, (samples, channels), strides, other.storage_offset())


def code_layout(
    image: Layout, upsample: int = 1, padding: Padding = NO_PADDING, room: int = 0
) -> Layout:
    """Where the codes of an image lie, upsampled, then padded.

    A pixel has room for so many channels; without a room, for whole dwords.
    """
    height, width = padding.around(image.height * upsample, image.width * upsample)
    padded = room or -(-image.channels // 4) * 4
    strides = (height * width * padded, width * padded, padded)
    return Layout(image.batch, height, width, padded, *strides)
