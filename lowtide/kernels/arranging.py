"""A weight between the order of a checkpoint and that of the kernels, by the native library."""

from dataclasses import replace

import torch
from torch import Tensor

from lowtide.formats import packed_bytes
from lowtide.kernels import native_library
from lowtide.kernels.ops import Spec
from lowtide.kernels.panels import Panels, empty_panels, offsets
from lowtide.kernels.rows import Rows, rows_of_grid


def arranged(packed: Tensor, rows: Rows, channels: int, taps: int) -> Panels:
    """The weight in panels, from the bytes of a checkpoint, by the native library."""
    empty = empty_panels(rows, channels, taps)
    _arrange(packed, rows, empty, channels, taps, backwards=False)
    return empty


def restored(data: Tensor, rows: Rows, channels: int, taps: int) -> Tensor:
    """The bytes of the checkpoint, flat, from those of the panels: the inverse of `arranged`."""
    packed = torch.zeros(int(_row_bytes(rows, channels * taps).sum()), dtype=torch.uint8)
    panels = replace(empty_panels(rows, channels, taps), data=data)
    _arrange(packed, rows, panels, channels, taps, backwards=True)
    return packed


def _row_bytes(rows: Rows, columns: int) -> Tensor:
    """The bytes of each packed row."""
    return -(-rows.bits * columns // 8)


def _arrange(
    packed: Tensor, rows: Rows, panels: Panels, channels: int, taps: int, *, backwards: bool
) -> None:
    row_start = offsets(_row_bytes(rows, channels * taps))
    doubled = rows.doubled.to(torch.int32)
    factor = None if rows.factor is None else rows.factor.contiguous()
    flat = packed.contiguous()
    arguments = native_library.Arrange(
        packed=flat.data_ptr(),
        row_start=row_start.data_ptr(),
        bits=rows.bits.data_ptr(),
        zero=rows.zero.data_ptr(),
        doubled=doubled.data_ptr(),
        factor=None if factor is None else factor.data_ptr(),
        group=rows.group,
        rows=len(rows.bits),
        channels=channels,
        taps=taps,
        data=panels.data.data_ptr(),
        panel=panels.panel.data_ptr(),
        masks=panels.masks.data_ptr(),
        sums=panels.sums.data_ptr(),
        planes=int(panels.planes),
        backwards=int(backwards),
    )
    native_library.native().run_one(arguments, torch.get_num_threads())


@torch.library.custom_op("lowtide::restore", mutates_args=())
def restore(data: Tensor, grid: list[Tensor], spec: list[int], channels: int, taps: int) -> Tensor:
    """The packed codes of a layer in the order of the checkpoint, from the bytes of its panels.

    `grid` and `spec` are those of lowtide::linear.
    """
    return restored(data, rows_of_grid(grid, Spec.of(spec)), channels, taps)


@restore.register_fake
def _(data: Tensor, grid: list[Tensor], spec: list[int], channels: int, taps: int) -> Tensor:
    rows = grid[0].shape[0]
    bits = spec[4:] * rows if len(spec) == 5 else spec[4:]
    return data.new_empty(sum(packed_bytes(channels * taps, each) for each in bits))
