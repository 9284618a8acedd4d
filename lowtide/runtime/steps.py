"""The steps of a program: calls of native kernels and of torch, with the views they use."""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor

from lowtide.kernels import native_library
from lowtide.kernels.divisors import Divisors
from lowtide.kernels.panels import Panels
from lowtide.kernels.triton.resident import ResidentWeight
from lowtide.runtime.layouts import NO_PADDING, Layout, Padding
from lowtide.runtime.memory import Address, Buffer, View


@dataclass(frozen=True)
class Rounding:
    """The grid of a layer's input: addresses of the running step's scale and zero, the last code.

    `key` is equal for two inputs that have the same grid at every step, and the same room: the
    channels that a pixel of codes has on a card. `column`: the quantizer's place in the numbers.
    """

    scale: int
    zero: int
    top: int
    smooth: Divisors | None
    key: tuple
    column: int = 0
    room: int = 0


@dataclass(eq=False)
class Output:
    """Where a kernel stores: a float view, or the codes of a layer's input (`rounding`).

    `sums`: the sum of each pixel's codes, on a card.
    """

    view: View
    layout: Layout
    rounding: Rounding | None = None
    padding: Padding = NO_PADDING
    upsample: int = 1
    sums: View | None = None

    def buffers(self) -> Iterator[Buffer]:
        return (view.buffer for view in (self.view, self.sums) if view is not None)

    @property
    def source_size(self) -> tuple[int, int]:
        """Height and width of the pixels before upsampling and padding."""
        height, width = self.padding.within(*self.layout.size)
        return height // self.upsample, width // self.upsample

    def sink(self, address: Address) -> native_library.Sink:
        rounding = self.rounding
        return native_library.Sink(
            address(self.view),
            self.layout.sample,
            self.layout.row,
            self.layout.column,
            rounding.scale if rounding else None,
            rounding.zero if rounding else None,
            *(rounding.smooth.addresses if rounding and rounding.smooth else (None, None)),
            rounding.top if rounding else 0,
            self.upsample,
            self.padding.above,
            self.padding.left,
            self.padding.below,
            self.padding.right,
            self.layout.channels,
        )


class Step:
    """One kernel call. `uses` lists every buffer that it reads or writes."""

    def uses(self) -> Iterator[Buffer]:
        raise NotImplementedError

    def structure(self, address: Address) -> ctypes.Structure:
        raise NotImplementedError


def address_or_none(view: View | None, address: Address) -> int | None:
    return None if view is None else address(view)


def _stride(view: View | None) -> int:
    """The stride between the samples of a vector per sample; 0 if all samples share one."""
    return 0 if view is None or view.meta.shape[0] == 1 else view.meta.stride(0)


@dataclass(eq=False)
class GemmStep(Step):
    """A packed layer: codes, or float32 values, times its weight, and the epilogue.

    `rounding`: the grid of the codes; None for values. `taps`: in bytes.
    `kernel`, `stride`, `dilation`: (vertical, horizontal).
    `gated`: the first half of the columns times the activation of the second half.
    """

    name: str
    codes: View
    codes_layout: Layout
    rounding: Rounding | None
    taps: Tensor
    weight: Panels | ResidentWeight
    bias: Tensor | None
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    output: Output
    sums: View | None = None
    per_sample: View | None = None
    gate: View | None = None
    residual: View | None = None
    factor: float = 1.0
    activation: int = native_library.IDENTITY
    gated: bool = False

    def uses(self) -> Iterator[Buffer]:
        views = (self.codes, self.sums, self.per_sample, self.gate, self.residual)
        read = (view.buffer for view in views if view is not None)
        return chain(read, self.output.buffers())

    @property
    def panels(self) -> Panels:
        """The weight of a step for a CPU."""
        assert isinstance(self.weight, Panels)
        return self.weight

    def structure(self, address: Address) -> native_library.Gemm:
        layout = self.codes_layout
        output = self.output.layout
        size = self.codes.meta.element_size()
        vertical, horizontal = self.stride
        return native_library.Gemm(
            x=address(self.codes),
            batch=output.batch,
            height=output.height,
            width=output.width,
            x_sample=size * layout.sample,
            x_row=size * vertical * layout.row,
            x_column=size * horizontal * layout.column,
            taps=self.taps.data_ptr(),
            tap_count=len(self.taps),
            tap_k4=self.panels.k4 // len(self.taps),
            x_scale=self.rounding.scale if self.rounding else None,
            x_zero=self.rounding.zero if self.rounding else None,
            weight=self.panels.structure,
            bias=None if self.bias is None else self.bias.data_ptr(),
            per_sample=address_or_none(self.per_sample, address),
            per_sample_stride=_stride(self.per_sample),
            gate=address_or_none(self.gate, address),
            gate_stride=_stride(self.gate),
            residual=address_or_none(self.residual, address),
            r_sample=output.pixels * self.panels.columns,
            r_row=output.width * self.panels.columns,
            r_column=self.panels.columns,
            factor=self.factor,
            activation=self.activation,
            gated=int(self.gated),
            sink=self.output.sink(address),
        )


@dataclass(frozen=True, eq=False)
class Source:
    """A float input of a stream, as pixels."""

    view: View
    layout: Layout


def _pair(kind: Any, values: list) -> Any:
    return (kind * 2)(*values, *[None if kind is ctypes.c_void_p else 0] * (2 - len(values)))


def _addresses(sources: list[Source], address: Address) -> Any:
    return _pair(ctypes.c_void_p, [address(source.view) for source in sources])


def _layouts(sources: list[Source], of: Callable[[Layout], int]) -> Any:
    return _pair(ctypes.c_int64, [of(source.layout) for source in sources])


@dataclass(eq=False)
class MomentsStep(Step):
    """The gain and offset of each channel that a group norm amounts to."""

    sources: list[Source]
    groups: int
    epsilon: float
    weight: Tensor | None
    bias: Tensor | None
    gain: View
    offset: View
    partial: View
    blocks: int

    def uses(self) -> Iterator[Buffer]:
        views = [source.view for source in self.sources]
        return (view.buffer for view in [*views, self.gain, self.offset, self.partial])

    def structure(self, address: Address) -> native_library.GroupMoments:
        first = self.sources[0].layout
        return native_library.GroupMoments(
            x=_addresses(self.sources, address),
            channels=_layouts(self.sources, lambda layout: layout.channels),
            x_sample=_layouts(self.sources, lambda layout: layout.sample),
            x_pixel=_layouts(self.sources, lambda layout: layout.column),
            batch=first.batch,
            pixels=first.pixels,
            groups=self.groups,
            epsilon=self.epsilon,
            weight=None if self.weight is None else self.weight.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            gain=address(self.gain),
            offset=address(self.offset),
            partial=address(self.partial),
            blocks=self.blocks,
        )


@dataclass(eq=False)
class StreamStep(Step):
    """An affine map by channel, an activation, a product, and up to four outputs."""

    sources: list[Source]
    activation: int
    gain: View | None = None
    offset: View | None = None
    times: Source | None = None
    outputs: list[Output] = field(default_factory=list)

    def is_full(self) -> bool:
        return len(self.outputs) == native_library.SINKS

    def uses(self) -> Iterator[Buffer]:
        views = [source.view for source in self.sources]
        times = None if self.times is None else self.times.view
        views += [view for view in (self.gain, self.offset, times) if view is not None]
        stored = chain.from_iterable(output.buffers() for output in self.outputs)
        return chain((view.buffer for view in views), stored)

    def structure(self, address: Address) -> native_library.Stream:
        first = self.sources[0].layout
        times = self.times
        return native_library.Stream(
            x=_addresses(self.sources, address),
            channels=_layouts(self.sources, lambda layout: layout.channels),
            x_sample=_layouts(self.sources, lambda layout: layout.sample),
            x_row=_layouts(self.sources, lambda layout: layout.row),
            x_column=_layouts(self.sources, lambda layout: layout.column),
            batch=first.batch,
            height=first.height,
            width=first.width,
            gain=address_or_none(self.gain, address),
            offset=address_or_none(self.offset, address),
            times=None if times is None else address(times.view),
            t_sample=0 if times is None else times.layout.sample,
            t_row=0 if times is None else times.layout.row,
            t_column=0 if times is None else times.layout.column,
            activation=self.activation,
            sinks=len(self.outputs),
            sink=_sinks(self.outputs, address),
        )


def _sinks(outputs: list[Output], address: Address) -> Any:
    return (native_library.Sink * native_library.SINKS)(*[each.sink(address) for each in outputs])


@dataclass(eq=False)
class LayerNormStep(Step):
    """Rows normalized, with a gain and a shift of each sample, and up to four outputs."""

    source: Source
    epsilon: float
    weight: Tensor | None
    bias: Tensor | None
    gain: View | None = None
    shift: View | None = None
    outputs: list[Output] = field(default_factory=list)

    def is_full(self) -> bool:
        return len(self.outputs) == native_library.SINKS

    def uses(self) -> Iterator[Buffer]:
        views = [view for view in (self.source.view, self.gain, self.shift) if view is not None]
        stored = chain.from_iterable(output.buffers() for output in self.outputs)
        return chain((view.buffer for view in views), stored)

    def structure(self, address: Address) -> native_library.LayerNorm:
        layout = self.source.layout
        return native_library.LayerNorm(
            x=address(self.source.view),
            batch=layout.batch,
            rows=layout.pixels,
            channels=layout.channels,
            x_sample=layout.sample,
            x_row=layout.row,
            epsilon=self.epsilon,
            weight=None if self.weight is None else self.weight.data_ptr(),
            bias=None if self.bias is None else self.bias.data_ptr(),
            gain=address_or_none(self.gain, address),
            gain_stride=_stride(self.gain),
            shift=address_or_none(self.shift, address),
            shift_stride=_stride(self.shift),
            sinks=len(self.outputs),
            sink=_sinks(self.outputs, address),
        )


@dataclass(eq=False)
class FeaturesStep(Step):
    """Features of the running step from a table (steps, width), the same for all samples."""

    table: Tensor
    step: Tensor
    output: View

    def uses(self) -> Iterator[Buffer]:
        return iter([self.output.buffer])

    def structure(self, address: Address) -> native_library.Row:
        return native_library.Row(
            table=self.table.data_ptr(),
            step=self.step.data_ptr(),
            y=address(self.output),
            width=self.table.shape[1],
            copies=self.output.shape[0],
        )


@dataclass(eq=False)
class TorchStep:
    """A call of torch, or of a module: what no native kernel covers. Its results are copied out.

    `arguments` and `keywords` hold Views where the call has tensors of the program.
    """

    name: str
    function: Callable
    arguments: Any
    keywords: Any
    results: list[View]
    reason: str = ""
    changed: list[View] = field(default_factory=list)
    read: list[View] = field(default_factory=list)

    def uses(self) -> Iterator[Buffer]:
        return (view.buffer for view in [*self.read, *self.results, *self.changed])
