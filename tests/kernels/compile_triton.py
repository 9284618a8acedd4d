"""Compiles Triton kernels for cards that are not there, and prints what came out as JSON.

Run as a program: `compile_triton.py 90 conv-w8a8 ...`. The launches of lowtide run as they are, but
each kernel is compiled for the card instead of being started. So signatures, alignments and tiles
are those of a real run. tests/kernels/test_triton_compiled.py reads the output.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from lowtide.formats import Affine, Mixed, pack, pack_mixed
from lowtide.kernels import Spec, native_library
from lowtide.kernels.triton import (
    attention_launches,
    operands,
    product_launches,
    rounding_launches,
)
from lowtide.kernels.triton.attention_launches import AttentionTables, attend
from lowtide.kernels.triton.operands import Epilogue, RoundedRows, StepTable, Window
from lowtide.kernels.triton.product_launches import multiply, multiply_floats, multiply_to_codes
from lowtide.kernels.triton.resident import ResidentWeight, resident_weight
from lowtide.kernels.triton.rounding_launches import (
    GroupNormWeights,
    LayerNormWeights,
    ReadPixels,
    moments_of,
    round_images,
    round_tokens,
    store_normed,
    store_stream,
)
from lowtide.kernels.triton.tiles import Choice, card_of

BF16 = torch.bfloat16
WINDOW = Window((3, 3))
MNEMONIC = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_]+)", re.M)
PTX = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.(\S+)|(cp\.async)\.c[ag]\.")


class Target:
    """The driver of a card that is not there."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def table(top: int = 255, smooth: int = 0) -> StepTable:
    steps = (torch.ones(50), torch.zeros(50, dtype=torch.uint8), torch.zeros((), dtype=torch.int64))
    return StepTable(*steps, top, torch.ones(smooth) if smooth else None)


def rows(samples: int, tall: int, wide: int, room: int) -> RoundedRows:
    data = torch.empty(samples, tall, wide, room, dtype=torch.int8)
    return RoundedRows(data, torch.empty(samples, tall, wide), room, table())


def weight(columns: int, channels: int, taps: int, form: Affine | Mixed) -> ResidentWeight:
    codes = torch.zeros(columns, channels * taps, dtype=torch.uint8)
    mixed = isinstance(form, Mixed)
    packed = pack_mixed(codes, form.bits) if mixed else pack(codes, form.bits)
    zero = torch.empty(0) if form.signed else torch.ones(columns, 1, dtype=torch.uint8)
    grid = [torch.ones(columns, 1), zero, torch.empty(0), torch.empty(0)]
    return resident_weight(packed, grid, Spec(channels * taps, form, 8), channels, taps)


W8 = Affine(8, signed=True, axis=0)
W4 = Affine(4, axis=0)


def conv(form: Affine, channels: int = 640) -> None:
    """The second convolution of a resnet block: the skip and a factor."""
    image = torch.empty(2, 64, 64, channels, dtype=BF16)
    late = Epilogue(torch.ones(channels), residual=image, factor=0.5)
    layer = weight(channels, channels, 9, form)
    multiply(rows(2, 66, 66, layer.room), layer, late, BF16, WINDOW)


def timed_conv(form: Affine, channels: int = 640) -> None:
    """The first convolution of a resnet block: a vector of the timestep for each sample."""
    vector = torch.ones(2, channels, dtype=BF16)
    layer = weight(channels, channels, 9, form)
    late = Epilogue(torch.ones(channels), vector)
    multiply(rows(2, 66, 66, layer.room), layer, late, BF16, WINDOW)


def strided(form: Affine) -> None:
    layer = weight(320, 320, 9, form)
    late = Epilogue(torch.ones(320))
    multiply(rows(2, 66, 66, layer.room), layer, late, BF16, Window((3, 3), (2, 2)))


def split(form: Affine) -> None:
    """A convolution of few pixels and many channels."""
    layer = weight(1280, 1280, 9, form)
    card = card_of(operands.capability_of(torch.empty(0)))
    late = Epilogue(torch.ones(1280))
    codes = rows(2, 10, 10, layer.room)
    multiply(codes, layer, late, BF16, WINDOW, Choice(card.tiles[0], 4))


def linear(form: Affine | Mixed) -> None:
    """The output of an attention block of DiT: a gate for each sample, and the skip."""
    layer = weight(1152, 1152, 1, form)
    gate = torch.ones(2, 1152, dtype=BF16)
    late = Epilogue(torch.ones(1152), gate=gate, residual=torch.empty(2, 256, 1, 1152, dtype=BF16))
    multiply(rows(2, 256, 1, layer.room), layer, late, BF16)


def feed_forward(form: Affine) -> None:
    """The first layer of a feed-forward block, whose output is rounded for the second one."""
    layer = weight(4608, 1152, 1, form)
    late = Epilogue(torch.ones(4608), activation=native_library.GELU_TANH)
    multiply_to_codes(rows(2, 256, 1, layer.room), layer, late, table(smooth=4608), 4608)


def weight_only(form: Affine) -> None:
    layer = weight(1152, 1152, 1, form)
    multiply_floats(torch.empty(2, 256, 1152, dtype=BF16), layer, torch.ones(1152))


def group_norm() -> None:
    x = torch.empty(2, 320, 64, 64, dtype=BF16).contiguous(memory_format=torch.channels_last)
    norm = GroupNormWeights(32, weight=torch.ones(320), bias=torch.ones(320))
    round_images(x, table(smooth=320), 320, (1, 1), norm, native_library.SILU)


def skip_norm() -> None:
    """A norm over a skip connection: the channels of two values, upsampled, stored as codes."""
    x = torch.empty(2, 320, 32, 32, dtype=BF16).contiguous(memory_format=torch.channels_last)
    norm = GroupNormWeights(32, weight=torch.ones(640), bias=torch.ones(640))
    moments = moments_of(x, x, norm)
    codes = rows(2, 66, 66, 640)
    stream = ReadPixels(x, x, norm, moments, native_library.SILU, up=2)
    store_stream(stream, codes.data, codes, (1, 1))


def gated_unit() -> None:
    """GEGLU: two halves of a product, as codes, and a norm as floats."""
    halves = torch.empty(2, 256, 1, 2 * 1280, dtype=BF16).permute(0, 3, 1, 2)
    hidden, gate = halves.chunk(2, 1)
    stream = ReadPixels(gate, activation=native_library.GELU_ERF, times=hidden)
    codes = rows(2, 256, 1, 1280)
    store_stream(stream, codes.data, codes)
    store_stream(stream, torch.empty(2, 256, 1, 1280, dtype=BF16))


def float_norm() -> None:
    tokens = torch.empty(2, 256, 1152, dtype=BF16)
    store_normed(tokens, LayerNormWeights(weight=torch.ones(1152)), torch.empty_like(tokens))


def layer_norm() -> None:
    vector = torch.ones(2, 1152, dtype=BF16)
    norm = LayerNormWeights(gain=vector, shift=vector)
    round_tokens(torch.empty(2, 256, 1152, dtype=BF16), table(), 1152, norm)


def rounding() -> None:
    round_tokens(torch.empty(2, 256, 1152, dtype=BF16), table(), 1152)


def attention(width: int, *, adaptive: bool = False) -> None:
    q = torch.empty(2, 256, 8, width, dtype=BF16).transpose(1, 2)
    tables = AttentionTables(table(), table(), table(), table(), adaptive)
    attend(q, q, q, tables)


CASES: dict[str, Callable[[], None]] = {
    "conv-w8a8": lambda: conv(W8),
    "conv-w8a8-320": lambda: conv(W8, 320),
    "conv-w4a8": lambda: conv(W4),
    "conv-w4a8-320": lambda: conv(W4, 320),
    "timed-w8a8": lambda: timed_conv(W8),
    "timed-w4a8": lambda: timed_conv(W4),
    "strided-w8a8": lambda: strided(W8),
    "strided-w4a8": lambda: strided(W4),
    "split-w4a8": lambda: split(W4),
    "linear-w8a8": lambda: linear(W8),
    "linear-w4a8": lambda: linear(W4),
    "linear-mixed": lambda: linear(Mixed((2, 4, 8) * 384, signed=False)),
    "codes-w8a8": lambda: feed_forward(W8),
    "codes-w4a8": lambda: feed_forward(W4),
    "linear-w8a16": lambda: weight_only(W8),
    "linear-w4a16": lambda: weight_only(W4),
    "group-norm": group_norm,
    "skip-norm": skip_norm,
    "gated-unit": gated_unit,
    "float-norm": float_norm,
    "layer-norm": layer_norm,
    "rounding": rounding,
    "attention-40": lambda: attention(40),
    "attention-72": lambda: attention(72),
    "attention-128": lambda: attention(128),
    "attention-adaptive": lambda: attention(64, adaptive=True),
}


def described(compiled: Any, name: str, seconds: float) -> dict[str, Any]:
    """What a test asks of a compiled kernel."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True)
        command = [tools / "nvdisasm", "-c", file.name]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = Counter(MNEMONIC.findall(code))
    found = [match.groups() for match in PTX.finditer(compiled.asm["ptx"])]
    text = usage.stdout + usage.stderr
    return {
        "kernel": name,
        "seconds": round(seconds, 1),
        "shared": compiled.metadata.shared,
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),
        "spills": counts["LDL"] + counts["STL"],
        "products": Counter(f"{kind} {form}" for kind, form, _ in found if kind),
        "copies": sum(1 for *_, copy in found if copy),
        "instructions": sum(counts.values()),
    }


def main(capability: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    triton.runtime.driver.set_active(Target(capability))
    known = divmod(capability, 10)
    for module in (operands, attention_launches, product_launches, rounding_launches):
        module.capability_of = lambda tensor: known
    made: list[dict[str, Any]] = []

    def compile_only(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            made.append(described(compiled, kernel.fn.__name__, time.perf_counter() - start))

        return launch

    JITFunction.__getitem__ = compile_only
    results: dict[str, list[dict[str, Any]]] = {}
    for name in names or list(CASES):
        made.clear()
        CASES[name]()
        results[name] = list(made)
    return results


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), sys.argv[2:])))
