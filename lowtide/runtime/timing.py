"""Where the time of a step goes: processor time by layer and by kind, fused and in plain torch.

program_times(root, act)   each step of the fused network's latest program
call_times(act)            each call of torch while `act` runs, of a float model
peak_rate()                what the native product reaches at best, on operands in the cache
forget_features(root)      the features of the conditions are computed again, as for a new image
"""

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lowtide.kernels import native_library
from lowtide.kernels.integers import IntegerWeight, Rows
from lowtide.kernels.panels import Panels, panels
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.report.kinds_of_work import ATTENTION, NORMS, PRODUCTS, TORCH
from lowtide.runtime.attention_step import AttentionStep
from lowtide.runtime.engines import kernel_of
from lowtide.runtime.memory import View
from lowtide.runtime.network import fused_forward
from lowtide.runtime.program import NativeCalls, Program
from lowtide.runtime.steps import GemmStep, Step, TorchStep

ATTENTION_CALL = "scaled_dot_product_attention"
# Names of torch's functions by the kind of their work; all others are "other calls of torch".
KIND_OF_CALL = {
    **dict.fromkeys(("linear", "conv2d", "conv1d", "addmm", "matmul"), PRODUCTS),
    **dict.fromkeys((ATTENTION_CALL, "softmax", "baddbmm", "bmm"), ATTENTION),
    **dict.fromkeys(("group_norm", "layer_norm", "silu", "gelu", "relu", "rms_norm"), NORMS),
}
# Rows, depth and columns of the probe: its codes and its weight fit in the second cache.
PROBE = (192, 512, 128)
PROBE_CALLS = 50
PROBE_ROUNDS = 12


@dataclass(frozen=True)
class TimedStep:
    """One step of a program, or all calls of one function of torch.

    seconds: processor time. operations: multiplications and additions, 0 if it has no product that
    is counted. kernel, reason and shape are those of a layer.
    """

    kind: str
    name: str
    seconds: float
    operations: int = 0
    kernel: str = ""
    reason: str = ""
    shape: str = ""


@dataclass(frozen=True)
class Parts:
    """The parts of one act, and the seconds of the whole act, measured beside them in turns."""

    whole: float
    steps: list[TimedStep]


def program_times(root: nn.Module, act: Callable[[], object], repeats: int) -> Parts:
    """The steps of the program that `act` runs last, each as the median of its times.

    `act` is a call of the fused network that computes the features of its conditions.
    """
    whole: list[float] = []
    _add_seconds(whole, act)
    program = _latest_program(root)
    parts = _single_parts(program)
    times: list[list[float]] = [[] for _ in parts]
    whole.clear()
    with torch.no_grad():
        for _ in range(repeats):
            _add_seconds(whole, act)
            for place, part in zip(times, parts, strict=True):
                _add_seconds(place, part.run)
    empty = _call_overhead()
    steps = [
        _timed(root, step, part, max(0.0, statistics.median(seconds) - empty))
        for step, part, seconds in zip(program.lowered.steps, parts, times, strict=True)
    ]
    return Parts(statistics.median(whole), steps)


def _add_seconds(place: list[float], act: Callable[[], object]) -> None:
    """Add the processor time of `act` to a list."""
    started = time.process_time()
    act()
    place.append(time.process_time() - started)


def _latest_program(root: nn.Module) -> Program:
    fused = fused_forward(root)
    assert fused is not None and fused.state is not None, "it has not run as a program"
    return list(fused.state.store.programs.values())[-1]


def _single_parts(program: Program) -> list[Any]:
    """Each step of the program as a call of its own."""
    parts: list[Any] = []
    for part in [*program.early, *program.late]:
        if isinstance(part, NativeCalls):
            parts += [_native_call(each) for each in part.structures]
        else:
            parts.append(part)
    return parts


def _native_call(structure: ctypes.Structure) -> NativeCalls:
    kernel = native_library.KERNELS[type(structure)]
    call = native_library.Call(kernel, 0, ctypes.addressof(structure))
    return NativeCalls((native_library.Call * 1)(call), [structure])


def _call_overhead() -> float:
    """Seconds of a call that does nothing: what timing a step alone adds to it."""
    nothing = NativeCalls((native_library.Call * 0)(), [])
    seconds: list[float] = []
    for _ in range(51):
        _add_seconds(seconds, nothing.run)
    return statistics.median(seconds)


def _timed(root: nn.Module, step: Step | TorchStep, part: Any, seconds: float) -> TimedStep:
    if isinstance(step, GemmStep):
        kernel = "native" if isinstance(part, NativeCalls) else _plain_name(type(part).__name__)
        return TimedStep(PRODUCTS, step.name, seconds, **_product_facts(root, step), kernel=kernel)
    if isinstance(step, AttentionStep):
        operations = 2 * _attention_products(step.query, step.key)
        return TimedStep(ATTENTION, "native attention", seconds, operations)
    if isinstance(step, TorchStep):
        return _timed_torch(root, step, seconds)
    return TimedStep(NORMS, _plain_name(type(step).__name__.removesuffix("Step")), seconds)


def _plain_name(name: str) -> str:
    """LayerNorm -> layer norm"""
    return "".join(f" {each.lower()}" if each.isupper() else each for each in name).strip()


def _attention_products(query: View, key: View) -> int:
    """Multiply-adds of both products of an attention, (batch, heads, tokens, width)."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * width


def _product_facts(root: nn.Module, step: GemmStep) -> dict[str, Any]:
    """Rows x depth x columns, and what they take."""
    layer = root.get_submodule(step.name)
    layout = step.output.layout
    rows = layout.batch * layout.pixels
    depth = min(4 * step.panels.k4, _depth(layer))
    return _product(rows, depth, step.panels.columns)


def _product(rows: int, depth: int, columns: int) -> dict[str, Any]:
    shape = f"{rows} x {depth} x {columns}"
    return {"operations": 2 * rows * depth * columns, "shape": shape}


def _depth(layer: nn.Module) -> int:
    """How many inputs an output of the layer adds up."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    assert isinstance(layer, nn.Linear)
    return layer.in_features


def _timed_torch(root: nn.Module, step: TorchStep, seconds: float) -> TimedStep:
    """A layer that runs in torch, with the reason, or another call of torch."""
    layer = dict(root.named_modules()).get(step.name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        kind = ATTENTION if step.name in (ATTENTION_CALL, "attend") else TORCH
        return TimedStep(kind, step.name, seconds)
    result = step.results[0].shape
    columns = layer.out_channels if isinstance(layer, nn.Conv2d) else layer.out_features
    facts = _product(result.numel() // columns, _depth(layer), columns)
    reason = step.reason or _torch_reason(layer)
    return TimedStep(PRODUCTS, step.name, seconds, **facts, kernel="torch", reason=reason)


def _torch_reason(layer: nn.Module) -> str:
    if not isinstance(layer, PackedLinear | PackedConv2d):
        return "it is not quantized"
    kernel = kernel_of(layer)
    known = kernel.startswith("plain torch: ")
    return kernel.removeprefix("plain torch: ") if known else "its input is not made of rows"


class _TimedCalls(TorchFunctionMode):
    """Processor time of each call of torch, by the function's name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        started = time.process_time()
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - started
        return result


def call_times(act: Callable[[], object], repeats: int) -> Parts:
    """The calls of torch while `act` runs, each function as the median over all runs."""
    whole: list[float] = []
    runs: list[dict[str, float]] = []
    for _ in range(repeats):
        _add_seconds(whole, act)
        with _TimedCalls() as timed:
            act()
        runs.append(timed.seconds)
    medians = {name: statistics.median(run.get(name, 0.0) for run in runs) for name in runs[0]}
    steps = [
        TimedStep(KIND_OF_CALL.get(name, TORCH), name, seconds) for name, seconds in medians.items()
    ]
    return Parts(statistics.median(whole), steps)


def forget_features(root: nn.Module) -> None:
    """Forget the features that are kept for the conditions of earlier calls."""
    fused = fused_forward(root)
    if fused is not None and fused.state is not None:
        for program in fused.state.store.programs.values():
            program.known.clear()


def peak_rate() -> float:
    """Operations in a second of processor time: a native product whose operands are in the cache.

    0 where there is no native library.
    """
    if native_library.native().library is None:
        return 0.0
    rows, depth, columns = PROBE
    codes = torch.randint(0, 255, (rows, depth), dtype=torch.uint8)
    weight = _probe_weight(depth, columns)
    output = torch.empty(rows, columns)
    grid = torch.tensor([0.01, 128.0])
    taps = torch.zeros(1, dtype=torch.int64)
    sink = native_library.Sink(output.data_ptr(), 0, columns, columns, upsample=1, channels=columns)
    product = native_library.Gemm(
        x=codes.data_ptr(),
        batch=1,
        height=rows,
        width=1,
        x_row=depth,
        x_column=depth,
        taps=taps.data_ptr(),
        tap_count=1,
        tap_k4=depth // 4,
        x_scale=grid.data_ptr(),
        x_zero=grid.data_ptr() + grid.element_size(),
        weight=weight.structure,
        factor=1.0,
        sink=sink,
    )
    call = native_library.Call(native_library.GEMM, 0, ctypes.addressof(product))
    calls = (native_library.Call * PROBE_CALLS)(*[call] * PROBE_CALLS)
    return 2 * rows * depth * columns * PROBE_CALLS / _best_seconds(calls)


def _probe_weight(depth: int, columns: int) -> Panels:
    rows = Rows(
        bits=torch.full((columns,), 8, dtype=torch.int32),
        doubled=torch.zeros(columns, dtype=torch.bool),
        zero=torch.full((columns,), 128, dtype=torch.int32),
        scale=torch.full((columns,), 1e-3),
    )
    codes = torch.randint(0, 255, (columns, 1, depth), dtype=torch.uint8)
    return panels(IntegerWeight(codes, rows))


def _best_seconds(calls: ctypes.Array[native_library.Call]) -> float:
    """The least processor time of one thread for all calls: nothing can be faster than the peak."""
    seconds: list[float] = []
    for _ in range(PROBE_ROUNDS):
        _add_seconds(seconds, lambda: native_library.native().run(calls, 1))
    return min(seconds)
