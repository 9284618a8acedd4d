"""Engines: which of the native kernels and oneDNN runs each packed layer of a program, and why."""

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.kernels import native_library, onednn
from lowtide.kernels.onednn import Geometry, OneDnnWeight, prepacked
from lowtide.kernels.race import ENGINES, NATIVE, ONEDNN, Races, Times, best_times, saved_races
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.nn.swap import packed_layers
from lowtide.runtime import on_gpu, onednn_layer
from lowtide.runtime.layers import native_name, unsupported
from lowtide.runtime.layouts import Layout
from lowtide.runtime.lowering import Lowered
from lowtide.runtime.memory import Arena, View, new_view
from lowtide.runtime.program import NativeCalls, TorchCall, parts_of
from lowtide.runtime.steps import GemmStep, Rounding, Source, Step, StreamStep, TorchStep

SECONDS = 0.8  # of all races of a program
PIXELS = 512  # of one sample that a race runs; more have the same time for each pixel

ACTIVATIONS: dict[int, Callable[[Tensor], Tensor]] = {
    native_library.SILU: F.silu,
    native_library.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    native_library.GELU_ERF: F.gelu,
}


class Engines:
    """The choice for each product of a denoiser. Programs of several shapes share the weights.

    kept: the kernels of shapes in words, which it keeps to; it adds those that it chooses.
    """

    def __init__(self, root: nn.Module, forced: str | None, kept: dict[str, str] | None = None):
        assert forced in (None, *ENGINES)
        self.layers = dict(packed_layers(root))
        self.forced = forced
        self.kept = kept
        self.weights: dict[tuple[str, int], OneDnnWeight] = {}

    def assigned(self, lowered: Lowered) -> Lowered:
        """The same program with oneDNN in the place of native products, where it is faster."""
        if self.forced == NATIVE or onednn.unsupported():
            return lowered
        races = saved_races()
        deadline = time.perf_counter() + SECONDS
        early: list[Step | TorchStep] = []
        late: list[Step | TorchStep] = []
        for place, step in enumerate(lowered.steps):
            steps = early if place < lowered.conditional else late
            if isinstance(step, GemmStep) and self._choice(step, races, deadline) == ONEDNN:
                steps += onednn_steps(read_by_pixels(step), self._weight(step))
            else:
                steps.append(step)
        races.save()
        return replace(lowered, steps=[*early, *late], conditional=len(early))

    def _choice(self, step: GemmStep, races: Races, deadline: float) -> str:
        """The engine of this product. The layer remembers it with the reason."""
        layer = self.layers[step.name]
        if step.rounding is None:
            layer.kernel = f"{native_name(layer)}: its inputs are in float"
            return NATIVE
        if self.forced == ONEDNN:
            layer.kernel = "oneDNN: it was asked for"
            return ONEDNN
        shape = shape_of(step, onednn_layer.geometry(layer), native_name(layer))
        if self.kept is None:
            return self._raced(step, shape, races, deadline)
        if shape not in self.kept:
            self._raced(step, shape, races, deadline)
            self.kept[shape] = layer.kernel
        layer.kernel = self.kept[shape]
        return ONEDNN if layer.kernel.startswith("oneDNN") else NATIVE

    def _raced(self, step: GemmStep, shape: str, races: Races, deadline: float) -> str:
        """The engine that won the race of this shape."""
        layer = self.layers[step.name]
        if shape not in races.known:
            if time.perf_counter() > deadline:
                layer.kernel = f"{native_name(layer)}: races took {SECONDS} s, the next goes on"
                return NATIVE
            try:
                races.add(shape, race(read_by_pixels(step), onednn_layer.geometry(layer)))
            except RuntimeError as error:
                [first, *_] = str(error).splitlines() or [""]
                layer.kernel = f"{native_name(layer)}: oneDNN fails on this shape ({first})"
                return NATIVE
        times = races.known[shape]
        winner = times.winner(keeps_bits=step.panels.planes)
        name = "oneDNN" if winner == ONEDNN else native_name(layer)
        layer.kernel = f"{name}: {times.reason(winner)}"
        return winner

    def _weight(self, step: GemmStep) -> OneDnnWeight:
        key = (step.name, _channels(step))
        if key not in self.weights:
            self.weights[key] = onednn_layer.onednn_weight(self.layers[step.name], key[1])
        return self.weights[key]


def kernels_of(root: nn.Module) -> dict[str, str]:
    """The kernel of each packed layer on this machine, and why."""
    races = saved_races()
    return {name: kernel_of(layer, races) for name, layer in packed_layers(root)}


def kernel_of(layer: PackedLinear | PackedConv2d, races: Races | None = None) -> str:
    """The kernel that ran this layer, and why. Before a run: what the known races say."""
    if layer.kernel:
        return layer.kernel
    if layer.weight.device.type != "cpu":
        return on_gpu.kernel_name(layer)
    library = native_library.native()
    reason = library.reason if library.library is None else unsupported(layer)
    missing = onednn_layer.unsupported(layer)
    if reason:
        return f"plain torch: {reason}" if missing else f"oneDNN: {reason}"
    name = native_name(layer)
    if layer.input.format is None:
        return f"{name}: its inputs are in float"
    return name if missing or races is None else _in_races(layer, name, races)


def _in_races(layer: PackedLinear | PackedConv2d, name: str, races: Races) -> str:
    """The winner of the races of this size, at all numbers of pixels."""
    channels = -(-layer.channels // 4) * 4
    size = f"{size_of(channels, onednn_layer.geometry(layer), len(layer.rows().bits))},"
    known = [times for shape, times in races.known.items() if shape.startswith(size)]
    keeps_bits = layer.rows().keeps_bits
    winners = {times.winner(keeps_bits=keeps_bits) for times in known}
    if not winners:
        return f"{name}: the first call races it with oneDNN"
    if len(winners) > 1:
        return f"{name}, or oneDNN: the number of pixels decides"
    [winner] = winners
    return f"{name if winner == NATIVE else 'oneDNN'}: the faster one in the race"


# A product on oneDNN


@dataclass(frozen=True, eq=False)
class OneDnnProduct:
    """A step of torch: oneDNN's product, and the epilogue of a GemmStep up to its rounding."""

    weight: OneDnnWeight
    rounding: Rounding
    activation: int
    factor: float

    def __call__(
        self,
        codes: Tensor,
        per_sample: Tensor | None,
        gate: Tensor | None,
        residual: Tensor | None,
        place: Tensor,
    ) -> None:
        scale = ctypes.c_float.from_address(self.rounding.scale).value
        zero = ctypes.c_float.from_address(self.rounding.zero).value
        y = self.weight.product(codes, scale, int(zero)).view(place.shape)
        if per_sample is not None:
            y.add_(per_sample)
        if self.activation:
            y = ACTIVATIONS[self.activation](y)
        if gate is not None:
            y.mul_(gate)
        if residual is None:
            torch.mul(y, self.factor, out=place) if self.factor != 1 else place.copy_(y)
            return
        torch.add(y, residual, out=place)
        if self.factor != 1:
            place.mul_(self.factor)


def read_by_pixels(step: GemmStep) -> GemmStep:
    """The same step; a linear layer reads one pixel of codes for each pixel of its output.

    A layer may read a whole image as one row, whose codes still lie in pixels.
    """
    if len(step.taps) > 1 or step.stride != (1, 1):
        return step
    output = step.output.layout
    size = {"height": output.height, "width": output.width, "channels": _channels(step)}
    return replace(step, codes_layout=replace(step.codes_layout, batch=output.batch, **size))


def _channels(step: GemmStep) -> int:
    """The channels of each tap, in whole dwords."""
    return 4 * step.panels.k4 // len(step.taps)


def onednn_steps(step: GemmStep, weight: OneDnnWeight) -> list[Step | TorchStep]:
    """The steps in the place of a native product: oneDNN, and a stream where codes are stored."""
    assert step.rounding is not None, "oneDNN multiplies codes here"
    output = step.output
    rounded = output.rounding is not None
    columns = step.panels.columns
    dense = _dense(output.layout, columns)
    if rounded:
        place = new_view(
            torch.empty(dense.batch, dense.height, dense.width, columns, device="meta")
        )
    else:
        place = _pixels(output.view, output.layout)
    late = step.gate is not None or step.residual is not None or step.factor != 1
    assert not (rounded and late and step.activation), "an activation comes before the residual"
    activation = native_library.IDENTITY if rounded else step.activation
    product = OneDnnProduct(weight, step.rounding, activation, step.factor)
    residual = None if step.residual is None else _pixels(step.residual, dense)
    views = [
        _pixels(step.codes, step.codes_layout),
        _vector(step.per_sample),
        _vector(step.gate),
        residual,
    ]
    read = [view for view in views if view is not None]
    arguments = (*views, place)
    steps: list[Step | TorchStep] = [
        TorchStep("oneDNN", product, arguments, {}, [], "", [place], read)
    ]
    if rounded:
        steps.append(_rounding_stream(step, place, dense))
    return steps


def _rounding_stream(step: GemmStep, place: View, dense: Layout) -> StreamStep:
    """The activation and the rounding of a product that is in memory, (..., columns)."""
    if not step.gated:
        return StreamStep([Source(place, dense)], step.activation, outputs=[step.output])
    hidden, gate = (View(place.buffer, half) for half in place.meta.chunk(2, -1))
    layout = replace(dense, channels=dense.channels // 2)
    times = Source(hidden, layout)
    return StreamStep([Source(gate, layout)], step.activation, times=times, outputs=[step.output])


def _dense(layout: Layout, columns: int) -> Layout:
    row = layout.width * columns
    fields = (layout.batch, layout.height, layout.width, columns)
    return Layout(*fields, layout.height * row, row, columns)


def _pixels(view: View, layout: Layout) -> View:
    """The view as (batch, height, width, channels)."""
    size = (layout.batch, layout.height, layout.width, layout.channels)
    strides = (layout.sample, layout.row, layout.column, 1)
    return View(view.buffer, view.meta.as_strided(size, strides, view.meta.storage_offset()))


def _vector(view: View | None) -> View | None:
    """A vector of each sample, in a shape that broadcasts to pixels."""
    if view is None:
        return None
    samples, columns = view.shape
    strides = (view.meta.stride(0), 0, 0, 1)
    shape = (samples, 1, 1, columns)
    return View(view.buffer, view.meta.as_strided(shape, strides, view.meta.storage_offset()))


# The race of a product


def shape_of(step: GemmStep, geometry: Geometry, name: str) -> str:
    """What the time of a product depends on, in words. All batches share a race.

    So an image has the same bits in every batch: the engines round the last digit differently.
    """
    layout = step.output.layout
    down, across = geometry.stride
    pixels = f"{layout.height}x{layout.width} pixels"
    size = size_of(_channels(step), geometry, step.panels.columns)
    parts = {
        f"stride {down}x{across}": geometry.stride != (1, 1),
        "per sample": step.per_sample is not None,
        "gate": step.gate is not None,
        "gated": step.gated,
        "residual": step.residual is not None,
        f"activation {step.activation}": bool(step.activation),
        "rounded": step.output.rounding is not None,
    }
    named = [part for part, is_there in parts.items() if is_there]
    return ", ".join([size, pixels, name, *named, f"{torch.get_num_threads()} threads"])


def size_of(channels: int, geometry: Geometry, columns: int) -> str:
    tall, wide = geometry.kernel
    return f"{channels}x{tall}x{wide} to {columns}"


def race(step: GemmStep, geometry: Geometry) -> Times:
    """The best time of each engine for one sample of this product, in separate memory."""
    small = _one_sample(step, geometry)
    channels = step.codes_layout.channels
    taps = geometry.kernel[0] * geometry.kernel[1]
    values = torch.ones(step.panels.columns, taps, channels, dtype=torch.int8)
    weight = prepacked(values, step.panels.scale, step.bias, geometry)
    native = _runner([small])
    return best_times(native, _runner(onednn_steps(small, weight)))


def _runner(steps: list[Step | TorchStep]) -> Callable[[], None]:
    """Runs these steps on new memory, which is zero."""
    arena = Arena()
    buffers = set(chain.from_iterable(step.uses() for step in steps))
    arena.place(dict.fromkeys(buffers, (0, 0)))
    arena.memory.zero_()
    return _Runner(parts_of(steps, arena), arena).run


@dataclass(frozen=True)
class _Runner:
    """Steps on real memory. Native calls hold addresses alone, so the arena has to stay alive."""

    parts: list[NativeCalls | TorchCall]
    arena: Arena

    @torch.no_grad()
    def run(self) -> None:
        for part in self.parts:
            part.run()


def _one_sample(step: GemmStep, geometry: Geometry) -> GemmStep:
    """The product of the first rows of one sample, in buffers that no program has."""
    layout = step.output.layout
    height = min(layout.height, max(1, PIXELS // layout.width))
    read = (height - 1) * geometry.stride[0] + geometry.kernel[0]
    codes = step.codes_layout
    short = replace(codes, batch=1, height=read, sample=read * codes.row)
    if codes.row == 0:
        short = replace(short, height=1, sample=codes.channels)
    place = replace(
        layout, batch=1, height=height, sample=max(height * layout.row, layout.channels)
    )
    kind = torch.float32 if step.output.rounding is None else torch.uint8
    output = replace(step.output, view=_room(place, kind), layout=place)
    columns = step.panels.columns
    vector = torch.empty(1, columns, device="meta")
    return replace(
        step,
        codes=_room(short, torch.uint8),
        codes_layout=short,
        output=output,
        per_sample=None if step.per_sample is None else new_view(vector),
        gate=None if step.gate is None else new_view(vector),
        residual=None if step.residual is None else _room(_dense(place, columns), torch.float32),
    )


def _room(layout: Layout, kind: torch.dtype) -> View:
    """A new view with room for these pixels."""
    last = (layout.height - 1) * layout.row + (layout.width - 1) * layout.column
    size = (layout.batch - 1) * layout.sample + last + layout.channels
    return new_view(torch.empty(size, dtype=kind, device="meta"))
