"""The kernel table: each product of six models on a GPU, against cuDNN and cuBLAS in bf16.

    python bench/gpu/kernels.py --out kernels.json                    all models at batch 2 and 8
    python bench/gpu/kernels.py --out t.json --models sd15 --tiles    every tile of the card too

Needs torch 2.11 or newer with its triton, numpy and wrapt, but no diffusers. A shape that fails is
a row with its error, and the others go on. The file is written after every shape. Times are medians
of replayed CUDA graphs, in microseconds. Without a card, set TRITON_INTERPRET=1: `--models tiny`
then runs in Triton's interpreter, and its times mean nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

from gpu.shapes import MODELS, Conv, Shape

from lowtide.formats import Affine, pack
from lowtide.kernels import Spec
from lowtide.kernels.triton.operands import (
    Epilogue,
    RoundedRows,
    StepTable,
    Window,
    capability_of,
)
from lowtide.kernels.triton.product_launches import multiply, multiply_floats
from lowtide.kernels.triton.resident import ResidentWeight, resident_weight
from lowtide.kernels.triton.rounding_launches import round_images, round_tokens
from lowtide.kernels.triton.tiles import Choice, card_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The interpreter has no products of bf16, and its half-precision numbers are exact enough here.
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16
WIDTHS = {"w8a8": 8, "w4a8": 4, "w2a8": 2}
BATCHES = (2, 8)
REPEATS = 7
CALLS = 20


def timed(run: Callable[[], object]) -> float:
    """Microseconds of one call: the median of replays of a graph of many calls."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    times: list[float] = []
    for _ in range(REPEATS):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def weight_of(shape: Shape, bits: int) -> ResidentWeight:
    """Random codes, with the zero point in the middle."""
    codes = torch.randint(2**bits, (shape.columns, shape.k), dtype=torch.uint8, device=DEVICE)
    form = Affine(bits, signed=True, axis=0)
    empty = torch.empty(0, device=DEVICE)
    grid = [torch.full((shape.columns, 1), 2.0 / 2**bits, device=DEVICE), empty, empty, empty]
    taps = shape.kernel**2 if isinstance(shape, Conv) else 1
    spec = Spec(shape.k, form, 8)
    return resident_weight(pack(codes, bits), grid, spec, shape.channels, taps)


def values_of(weight: ResidentWeight) -> Tensor:
    """The weight in float32, rows x taps x channels, from the int8 segment."""
    [segment] = weight.segments
    assert segment.per == 1
    values = segment.data.reshape(weight.rows, weight.taps, weight.room)[..., : weight.channels]
    return values.float() * segment.scale.reshape(-1, 1, 1)


def table() -> StepTable:
    scale = torch.tensor([0.03], device=DEVICE)
    zero = torch.tensor([120], dtype=torch.uint8, device=DEVICE)
    return StepTable(scale, zero, torch.zeros(1, dtype=torch.int64, device=DEVICE))


class Products:
    """Ours and the others' products of one shape, on the same input."""

    def __init__(self, shape: Shape, batch: int):
        self.shape = shape
        self.is_image = isinstance(shape, Conv)
        self.window = Window()
        self.padding = (0, 0)
        if isinstance(shape, Conv):
            self.window = Window((shape.kernel,) * 2, (shape.stride,) * 2)
            self.padding = (shape.kernel // 2,) * 2
            size = (batch, shape.channels, shape.size, shape.size)
            x = torch.randn(size, device=DEVICE, dtype=FLOAT)
            self.x = x.contiguous(memory_format=torch.channels_last)
        else:
            size = (batch, shape.tokens, shape.channels)
            self.x = torch.randn(size, device=DEVICE, dtype=FLOAT)
        self.bias = torch.randn(shape.columns, device=DEVICE)

    def rounded(self, weight: ResidentWeight) -> RoundedRows:
        if self.is_image:
            return round_images(self.x, table(), weight.room, self.padding)
        return round_tokens(self.x, table(), weight.room)

    def ours(
        self, codes: RoundedRows, weight: ResidentWeight, choice: Choice | None = None
    ) -> Tensor:
        late = Epilogue(self.bias)
        return multiply(codes, weight, late, FLOAT, self.window, choice)

    def plain(self, x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """torch's product on channels-last operands; values: rows x taps x channels."""
        if not isinstance(self.shape, Conv):
            return F.linear(x, values.flatten(1), bias)
        side = self.shape.kernel
        images = values.reshape(-1, side, side, self.shape.channels).permute(0, 3, 1, 2)
        return F.conv2d(x, images, bias, self.window.stride, self.padding)

    def error(self, weight: ResidentWeight) -> float:
        """Relative L2 of the first sample against float64 on the same codes."""
        found = self.ours(self.rounded(weight), weight).double()
        scale, zero = (each.double() for each in (table().scale, table().zero))
        codes = (self.x[:1].float() / table().scale).round().double() + zero
        x = (codes.clamp(0, 255) - zero) * scale
        expected = self.plain(x, values_of(weight).double(), self.bias.double())
        if self.is_image:
            expected = expected.permute(0, 2, 3, 1)
        first = found.reshape(-1, self.shape.columns)[: self.shape.rows(1)]
        expected = expected.reshape(first.shape)
        return float((first - expected).norm() / expected.norm())


def measured(shape: Shape, batch: int, *, tiles: bool) -> dict[str, Any]:
    """One row of the table."""
    products = Products(shape, batch)
    weight = weight_of(shape, 8)
    values = values_of(weight).to(FLOAT)
    bias = products.bias.to(FLOAT)
    codes = products.rounded(weight)
    row: dict[str, Any] = {
        "error": products.error(weight),
        "float_us": timed(lambda: products.plain(products.x, values, bias)),
        "rounding_us": timed(lambda: products.rounded(weight)),
    }
    for name, bits in WIDTHS.items():
        resident = weight_of(shape, bits)
        own = products.rounded(resident)
        row[f"{name}_us"] = timed(partial(products.ours, own, resident))
        if bits == 4 and not products.is_image:
            run = partial(multiply_floats, products.x, resident, products.bias)
            row["w4a16_us"] = timed(run)
    if not products.is_image:
        row |= int_mm(codes, weight)
    if tiles:
        row["tiles"] = tile_times(products, weight, codes)
    work = 2 * shape.rows(batch) * shape.k * shape.columns
    row["float_tflops"] = work / row["float_us"] / 1e6
    row["w8a8_tflops"] = work / row["w8a8_us"] / 1e6
    row["w8a8_ratio"] = row["float_us"] / row["w8a8_us"]
    row["w4a8_ratio"] = row["float_us"] / row["w4a8_us"]
    return row


def int_mm(codes: RoundedRows, weight: ResidentWeight) -> dict[str, Any]:
    """torch's int8 product without an epilogue; it refuses some shapes."""
    flat = codes.data.reshape(-1, weight.room)
    try:
        return {"int_mm_us": timed(lambda: torch._int_mm(flat, weight.segments[0].data.t()))}
    except RuntimeError as error:
        return {"int_mm": str(error).splitlines()[0]}


def tile_times(
    products: Products, weight: ResidentWeight, codes: RoundedRows
) -> list[dict[str, Any]]:
    """The time of each tile of this kind of card."""
    found: list[dict[str, Any]] = []
    for tile in card_of(capability_of(products.x)).tiles:
        if weight.room % tile.k:
            continue
        run = partial(products.ours, codes, weight, Choice(tile))
        try:
            found.append(asdict(tile) | {"us": timed(run)})
        except Exception as error:  # another tile may still run
            found.append(asdict(tile) | {"failed": repr(error)[:200]})
    return found


def machine() -> dict[str, str]:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "interpreter"
    return {"card": name, "torch": torch.__version__, "triton": triton.__version__}


def line(row: dict[str, Any]) -> str:
    """A row of the table on the screen."""
    label = f"{row['model']:13} {row['batch']:3} {row['shape']:44}"
    if "failed" in row:
        return f"{label} failed: {row['failed'][:80]}"
    times = [row["float_us"], row["w8a8_us"], row["w4a8_us"], row["rounding_us"]]
    numbers = " ".join(f"{each:10.1f}" for each in times)
    ratios = f"{row['w8a8_ratio']:6.2f} {row['w4a8_ratio']:6.2f}"
    return f"{label} {numbers} {ratios} {row['error']:9.1e}"


def run(
    models: list[str], batches: list[int], out: Path, seconds: float, *, tiles: bool
) -> list[dict[str, Any]]:
    """Time all shapes until the time is over, and write the file after each."""
    torch.backends.cudnn.benchmark = True
    deadline = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    print(f"{'model':13} {'b':>3} {'shape':44} {'bf16 us':>10} {'w8a8 us':>10} {'w4a8 us':>10}"
          f" {'rounding':>10} {'w8a8':>6} {'w4a8':>6} {'error':>9}")  # fmt: skip
    shapes = [(model, shape) for model in models for shape in MODELS[model]]
    for batch in batches:
        for model, shape in shapes:
            row: dict[str, Any] = {"model": model, "batch": batch, "shape": str(shape)}
            if time.monotonic() > deadline:
                row["failed"] = f"the {seconds:.0f} s were over"
            else:
                try:
                    row |= measured(shape, batch, tiles=tiles)
                except Exception as error:  # another shape may still run
                    row["failed"] = repr(error)[:500]
            rows.append(row)
            print(line(row), flush=True)
            out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """0 if every shape ran."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    real = [name for name in MODELS if name != "tiny"]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=real)
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="no shape starts after this")
    parser.add_argument("--tiles", action="store_true", help="time every tile of the card")
    given = parser.parse_args(arguments)
    rows = run(given.models, given.batches, given.out, given.seconds, tiles=given.tiles)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
