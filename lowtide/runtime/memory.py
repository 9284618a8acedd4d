"""Memory of a program: every value has a fixed address, and values that never meet share it.

A value is a View: a tensor on the meta device, which knows shape and strides, on a Buffer. Views of
one buffer share a meta storage, so torch itself says what a reshape or a chunk of a value is.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowtide.runtime.layouts import is_dense

ALIGNMENT = 64
CPU_MEMORY = torch.device("cpu")


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


def new_view(meta: Tensor, fixed: torch.device | None = None) -> View:
    """A new buffer for a tensor of this shape, strides and type. `fixed`: where it stays."""
    extent = sum(
        (size - 1) * stride for size, stride in zip(meta.shape, meta.stride(), strict=True)
    )
    elements = extent + 1 if meta.numel() else 0
    like = same_strides(meta, meta.dtype)
    buffer = Buffer(elements * meta.element_size())
    if fixed is not None:
        buffer.fixed = torch.empty(max(elements, 1), dtype=meta.dtype, device=fixed)
    return View(buffer, like)


def is_whole(view: View) -> bool:
    """Whether the view covers its buffer without gaps or repeats."""
    nbytes = view.meta.numel() * view.meta.element_size()
    return is_dense(view.meta) and nbytes == view.buffer.nbytes


def whole_buffer(view: View) -> View:
    """All elements of the buffer behind a view, in one axis."""
    elements = view.buffer.nbytes // view.meta.element_size()
    return View(view.buffer, torch.empty(elements, dtype=view.meta.dtype, device="meta"))


def same_strides(meta: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this shape and these strides, of another type."""
    return torch.empty_strided(meta.shape, meta.stride(), dtype=dtype, device="meta")


@dataclass
class Arena:
    """Places buffers so that those whose lives overlap do not overlap in memory."""

    device: torch.device = CPU_MEMORY
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
        self.memory = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

    def address(self, view: View) -> int:
        start = int(view.meta.storage_offset()) * view.meta.element_size()
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
