"""Launches of the products of packed layers. None waits for the device."""

# triton is not installed everywhere, and a launch also takes options of Triton's compiler.
# pyright: reportMissingImports=false, reportCallIssue=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowtide.kernels.triton.float_products import float_product
from lowtide.kernels.triton.int_products import finish, product
from lowtide.kernels.triton.operands import (
    OPTIONS,
    Epilogue,
    RoundedRows,
    StepTable,
    Window,
    capability_of,
    kind_of_products,
    on,
    sample_stride,
)
from lowtide.kernels.triton.resident import ResidentWeight, Segment
from lowtide.kernels.triton.tile_race import RACES
from lowtide.kernels.triton.tiles import Choice, Shape, Tile, choose

FLAT = Window()
KINDS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Values of the largest tile: of floats, of codes whose epilogue rounds, of other codes.
FLOATS = 128 * 128
ROUNDED = 64 * 128
LARGEST = 256 * 128
FLOAT_STEP = 64  # values of k, which are twice as long as codes
FINISH = Tile(32, 128, 0, 4, 1)  # adds the parts of a split sum


@dataclass(frozen=True)
class StoredRows:
    """Where a product is stored: float rows, or codes with their sums and their grid."""

    data: Tensor
    sums: Tensor | None = None
    table: StepTable | None = None


def multiply(
    codes: RoundedRows,
    weight: ResidentWeight,
    epilogue: Epilogue,
    dtype: torch.dtype,
    window: Window = FLAT,
    choice: Choice | None = None,
) -> Tensor:
    """The layer's output, (samples, tall, wide, columns) in this dtype."""
    y = _output(codes, weight, window, dtype)
    if y.numel():
        multiply_into(codes, weight, epilogue, StoredRows(y), window, choice)
    return y


def multiply_to_codes(
    codes: RoundedRows,
    weight: ResidentWeight,
    epilogue: Epilogue,
    table: StepTable,
    room: int,
    window: Window = FLAT,
    choice: Choice | None = None,
) -> RoundedRows:
    """The codes of the layer's output, as the next layer reads them. They have no border."""
    y = _output(codes, weight, window, torch.int8)
    data = y.new_zeros(*y.shape[:3], room)
    sums = y.new_zeros(y.shape[:3], dtype=torch.float32)
    if data.numel():
        to = StoredRows(data, sums, table)
        multiply_into(codes, weight, epilogue, to, window, choice)
    return RoundedRows(data, sums, weight.rows, table)


def multiply_floats(
    x: Tensor, weight: ResidentWeight, bias: Tensor | None, choice: Choice | None = None
) -> Tensor:
    """A linear layer on inputs in float, (..., channels); the result has their dtype."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    rows = len(flat)
    y = x.new_empty(rows, weight.rows)
    for segment in weight.segments if rows else ():
        columns = len(segment.scale)
        step = FLOAT_STEP * max(1, segment.per // 2)
        shape = Shape(rows, columns, weight.k, segment.run, step, FLOATS)
        # Sums of floats depend on the tile. A race would make their bits a matter of luck.
        tile = choice.tile if choice else choose(capability_of(x), shape, splits=(1,)).tile
        with on(x):
            float_product[(_count(rows, columns, tile),)](
                flat,
                flat.stride(0),
                segment.data,
                segment.zero,
                segment.scale,
                _of_rows(bias, segment),
                segment.place,
                y,
                y.stride(0),
                rows,
                columns,
                CHANNELS=weight.channels,
                C=weight.room,
                PER=segment.per,
                KIND=kind_of_products(x, KINDS[x.dtype]),
                BM=tile.rows,
                BN=tile.columns,
                BK=tile.k,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **OPTIONS,
            )
    return y.reshape(*x.shape[:-1], weight.rows)


def _output(
    codes: RoundedRows, weight: ResidentWeight, window: Window, dtype: torch.dtype
) -> Tensor:
    samples, tall, wide, _ = codes.data.shape
    return codes.data.new_empty(samples, *window.output(tall, wide), weight.rows, dtype=dtype)


def _of_rows(vector: Tensor | None, segment: Segment) -> Tensor | None:
    """A vector of all output channels, in the order of a segment's rows."""
    return vector if vector is None or segment.place is None else vector[segment.place]


def multiply_into(
    codes: RoundedRows,
    weight: ResidentWeight,
    epilogue: Epilogue,
    to: StoredRows,
    window: Window = FLAT,
    choice: Choice | None = None,
) -> None:
    """Store the layer's output. Sums of codes are added, so they and the room are zero before."""
    samples, tall, wide, _ = to.data.shape
    rows = samples * tall * wide
    for segment in weight.segments:
        most = ROUNDED if to.table else LARGEST
        shape = Shape(rows, len(segment.scale), weight.k, segment.run, weight.room, most)
        launch = _SegmentLaunch(codes, weight, segment, epilogue, window)
        card = capability_of(codes.data)
        chosen = choice or RACES.choice(codes.data, card, shape, launch.beside(to))
        launch(chosen, to)


@dataclass(frozen=True)
class _SegmentLaunch:
    """Launches the product of one segment of a weight's rows."""

    codes: RoundedRows
    weight: ResidentWeight
    segment: Segment
    epilogue: Epilogue
    window: Window

    def beside(self, to: StoredRows) -> Callable[[Choice], None]:
        """A launch that stores into memory of its own, which is taken when it first runs."""
        spare: list[StoredRows] = []

        def launch(choice: Choice) -> None:
            if not spare:
                sums = None if to.sums is None else torch.empty_like(to.sums)
                spare.append(StoredRows(torch.empty_like(to.data), sums, to.table))
            self(choice, spare[0])

        return launch

    def __call__(self, chosen: Choice, to: StoredRows) -> None:
        codes = self.codes
        tile = chosen.tile
        assert tile.k % self.segment.run == 0, "a step of k holds whole runs"
        samples, tall, wide, _ = to.data.shape
        rows = samples * tall * wide
        columns = len(self.segment.scale)
        parts = None
        if chosen.split > 1:
            parts = codes.data.new_empty(chosen.split, rows, columns, dtype=torch.int32)
        layer = _layer(codes, self.segment, self.epilogue)
        late = _late(self.epilogue, to, parts)
        numbers = _numbers(codes, self.epilogue, to, columns)
        huge = rows * max(self.weight.rows, to.data.shape[3]) >= 2**31
        constants = _constants(codes, self.window, self.epilogue)
        constants |= {"SPLIT": chosen.split, "HUGE": huge}
        with on(codes.data):
            product[(_count(rows, columns, tile), chosen.split)](
                codes.data,
                codes.sums,
                self.segment.data,
                *layer,
                *late,
                *numbers,
                C=self.weight.room,
                PER=self.segment.per,
                ONE_SAMPLE=tall * wide % tile.rows == 0,
                BM=tile.rows,
                BN=tile.columns,
                BK=tile.k,
                **constants,
                num_warps=tile.warps,
                num_stages=tile.stages,
                **OPTIONS,
            )
            if chosen.split > 1:
                finish[(_count(rows, columns, FINISH), 1)](
                    codes.sums,
                    *layer,
                    *late,
                    *numbers,
                    ONE_SAMPLE=tall * wide % FINISH.rows == 0,
                    BM=FINISH.rows,
                    BN=FINISH.columns,
                    **constants,
                    num_warps=FINISH.warps,
                    **OPTIONS,
                )


def _layer(codes: RoundedRows, segment: Segment, epilogue: Epilogue) -> list[Any]:
    """weight_zero .. index of the kernels."""
    return [
        segment.zero,
        segment.total,
        segment.scale,
        _of_rows(epilogue.bias, segment),
        segment.place,
        codes.table.scale,
        codes.table.zero,
        codes.table.index,
    ]


def _late(epilogue: Epilogue, to: StoredRows, parts: Tensor | None) -> list[Any]:
    """per_sample .. part_sums of the kernels."""
    residual = None if epilogue.residual is None else epilogue.residual.contiguous()
    table = to.table
    return [
        epilogue.per_sample,
        sample_stride(epilogue.per_sample),
        epilogue.gate,
        sample_stride(epilogue.gate),
        residual,
        0 if residual is None else residual.shape[3],
        to.data,
        to.data.shape[3],
        None if table is None else table.smooth,
        None if table is None else table.scale,
        None if table is None else table.zero,
        to.sums,
        parts,
    ]


def _numbers(codes: RoundedRows, epilogue: Epilogue, to: StoredRows, columns: int) -> list[Any]:
    """rows .. top of the kernels."""
    samples, tall, wide, _ = to.data.shape
    _, padded_tall, padded_wide, _ = codes.data.shape
    rows = samples * tall * wide
    return [
        rows,
        columns,
        tall,
        wide,
        padded_tall,
        padded_wide,
        codes.table.rows_per_step(rows),
        tall * wide,
        float(epilogue.factor),
        0.0 if to.table is None else float(to.table.top),
    ]


def _count(rows: int, columns: int, tile: Tile) -> int:
    """Tiles of a matrix."""
    return triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)


def _constants(codes: RoundedRows, window: Window, epilogue: Epilogue) -> dict[str, Any]:
    return {
        "TAPS": window.taps,
        "TAPS_WIDE": window.kernel[1],
        "VERTICAL": window.stride[0],
        "HORIZONTAL": window.stride[1],
        "DOWN": window.dilation[0],
        "ACROSS": window.dilation[1],
        "FLAT": window.is_flat,
        "ACTIVATION": epilogue.activation,
        "ONE_STEP": codes.table.is_one_step,
    }
