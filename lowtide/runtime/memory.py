"""Memory of a program: every value has a fixed address, and values that never meet share it.

A value is a View: a tensor on the meta device, which knows shape and strides, on a Buffer. Views of
one buffer share a meta storage, so torch itself says what a reshape or a chunk of a value is.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

ALIGNMENT = 64


@dataclass(eq=False)
class Buffer:
    """Bytes of the arena, or a tensor outside of it (`fixed`) that lives between runs."""

    nbytes: int
    fixed: Tensor | None = None
    offset: int = -1


@dataclass(frozen=True, eq=False)
class View:
    """A tensor in a buffer."""

    buffer: Buffer
    meta: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.meta.shape


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

    def reshaped(self, height: int, width: int) -> "Layout | None":
        """The same pixels in other rows, where one stride reaches them all."""
        if (height, width) == (self.height, self.width):
            return self
        if self.height > 1 and self.width > 1 and self.row != self.width * self.column:
            return None
        column = self.column if self.width > 1 else self.row
        fields = (self.batch, height, width, self.channels)
        return Layout(*fields, self.sample, width * column, column)


def new_view(meta: Tensor, *, fixed: bool = False) -> View:
    """A new buffer for a tensor of this shape, strides and type."""
    extent = sum(
        (size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)
    )
    elements = extent + 1 if meta.numel() else 0
    like = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device="meta")
    buffer = Buffer(elements * meta.element_size())
    if fixed:
        buffer.fixed = torch.empty(max(elements, 1), dtype=meta.dtype)
    return View(buffer, like)


def pixel_shape(batch: int, height: int, width: int, channels: int) -> Tensor:
    """A batch of images on the meta device, channels side by side in memory."""
    strides = (height * width * channels, 1, width * channels, channels)
    return torch.empty_strided((batch, channels, height, width), strides, device="meta")


def pixels_of(meta: Tensor) -> Layout | None:
    """An image batch (B, C, H, W) as pixels; None if its channels are not side by side."""
    if meta.dim() != 4 or (meta.shape[1] > 1 and meta.stride(1) != 1):
        return None
    batch, channels, height, width = meta.shape
    sample, _, row, column = meta.stride()
    return Layout(batch, height, width, channels, sample, row, column)


def tokens_of(meta: Tensor) -> Layout | None:
    """Tokens (B, ..., C) as pixels, a row each; None if their channels are not side by side."""
    if meta.dim() < 2 or (meta.shape[-1] > 1 and meta.stride(-1) != 1):
        return None
    if meta.dim() == 2:
        return Layout(meta.shape[0], 1, 1, meta.shape[1], meta.stride(0), 0, 0)
    stride = merged_stride(meta.shape[1:-1], meta.stride()[1:-1])
    if stride is None:
        return None
    count = meta.shape[1:-1].numel()
    return Layout(meta.shape[0], count, 1, meta.shape[-1], meta.stride(0), stride, stride)


def merged_stride(sizes: Iterable[int], strides: Iterable[int]) -> int | None:
    """The stride of several axes taken as one; None if there is none."""
    axes = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size > 1]
    if not axes:
        return 0
    for (_, outer), (size, inner) in zip(axes, axes[1:], strict=False):
        if outer != size * inner:
            return None
    return axes[-1][1]


def is_whole(view: View) -> bool:
    """Whether the view covers its buffer without gaps or repeats."""
    axes = sorted(zip(view.meta.stride(), view.meta.shape, strict=True))
    expected = 1
    for stride, size in axes:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return expected * view.meta.element_size() == view.buffer.nbytes


@dataclass
class Arena:
    """Places buffers so that those whose lives overlap do not overlap in memory."""

    nbytes: int = 0
    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.uint8))

    def place(self, lives: dict[Buffer, tuple[int, int]]) -> None:
        """Give each buffer an offset. A life is the first and the last step that uses it."""
        placed: list[Buffer] = []
        for buffer in sorted(lives, key=lambda buffer: -buffer.nbytes):
            first, last = lives[buffer]
            met = [each for each in placed if lives[each][0] <= last and first <= lives[each][1]]
            buffer.offset = _first_gap(buffer.nbytes, met)
            placed.append(buffer)
        self.nbytes = max((_end(buffer) for buffer in placed), default=0)
        self.memory = torch.empty(self.nbytes, dtype=torch.uint8)

    def address(self, view: View) -> int:
        start = view.meta.storage_offset() * view.meta.element_size()
        if view.buffer.fixed is not None:
            return view.buffer.fixed.data_ptr() + start
        return self.memory.data_ptr() + view.buffer.offset + start

    def tensor(self, view: View) -> Tensor:
        """The view as a tensor on the real memory."""
        meta = view.meta
        if view.buffer.fixed is not None:
            offset = meta.storage_offset()
            return view.buffer.fixed.as_strided(meta.shape, meta.stride(), offset)
        typed = self.memory.view(meta.dtype)
        offset = view.buffer.offset // meta.element_size() + meta.storage_offset()
        return typed.as_strided(meta.shape, meta.stride(), offset)


def _end(buffer: Buffer) -> int:
    return -(-(buffer.offset + buffer.nbytes) // ALIGNMENT) * ALIGNMENT


def _first_gap(nbytes: int, others: list[Buffer]) -> int:
    """The lowest offset where these bytes overlap none of the other buffers."""
    offset = 0
    for other in sorted(others, key=lambda buffer: buffer.offset):
        if offset + nbytes <= other.offset:
            break
        offset = max(offset, _end(other))
    return offset


Address = Callable[[View], int]
