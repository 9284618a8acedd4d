"""The steps of a program as launches of Triton kernels, on the memory of the program.

It imports triton, so it is imported when a program for a card is made.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.kernels.triton.attention_launches import AttentionTables, attend
from lowtide.kernels.triton.operands import Epilogue, RoundedRows, StepTable, Window
from lowtide.kernels.triton.product_launches import StoredRows, multiply_into
from lowtide.kernels.triton.resident import ResidentWeight
from lowtide.kernels.triton.rounding_launches import (
    ChunkMoments,
    GroupNormWeights,
    LayerNormWeights,
    ReadPixels,
    moments_of,
    store_normed,
    store_stream,
)
from lowtide.runtime.attention_step import AttentionStep
from lowtide.runtime.layouts import Layout
from lowtide.runtime.memory import Arena, Buffer, View
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.program import ProgramPart, torch_call
from lowtide.runtime.steps import (
    FeaturesStep,
    GemmStep,
    LayerNormStep,
    MomentsStep,
    Output,
    Rounding,
    Source,
    Step,
    StreamStep,
    TorchStep,
)


@dataclass(frozen=True)
class CardLaunch:
    """Some launches of one step."""

    run: Callable[[], None]


@dataclass
class NormMoments:
    """The moments of a group norm. Their memory is made by the first run."""

    x: Tensor
    joined: Tensor | None
    norm: GroupNormWeights
    found: ChunkMoments | None = None

    def run(self) -> None:
        self.found = moments_of(self.x, self.joined, self.norm, self.found)


class Launches:
    """Turns steps into launches. `numbers`: the grids of all steps, and the running step."""

    def __init__(self, numbers: Numbers):
        self.numbers = numbers
        self.columns = numbers.table.T.contiguous()
        self.moments: dict[Buffer, NormMoments] = {}

    def of(self, steps: list[Step | TorchStep], arena: Arena) -> list[ProgramPart]:
        return [self._part(step, arena) for step in steps]

    def _part(self, step: Step | TorchStep, arena: Arena) -> ProgramPart:
        places = Places(arena, self.numbers, self.columns)
        if isinstance(step, TorchStep):
            return torch_call(step, arena)
        if isinstance(step, GemmStep):
            return CardLaunch(product_launch(step, places))
        if isinstance(step, MomentsStep):
            self.moments[step.gain.buffer] = _moments(step, places)
            return self.moments[step.gain.buffer]
        if isinstance(step, StreamStep):
            moments = None if step.gain is None else self.moments[step.gain.buffer]
            return CardLaunch(stream_launch(step, places, moments))
        if isinstance(step, LayerNormStep):
            return CardLaunch(normed_launch(step, places))
        if isinstance(step, AttentionStep):
            return CardLaunch(attention_launch(step, places))
        assert isinstance(step, FeaturesStep), f"{type(step).__name__} has no kernel on a card"
        return CardLaunch(features_launch(step, places))


@dataclass(frozen=True)
class Places:
    """Views as tensors, and roundings as tables of all steps."""

    arena: Arena
    numbers: Numbers
    columns: Tensor

    def tensor(self, view: View | None) -> Tensor | None:
        return None if view is None else self.arena.tensor(view)

    def image(self, source: Source | None) -> Tensor | None:
        """The pixels of a source as (samples, channels, height, width)."""
        if source is None:
            return None
        layout = source.layout
        size = (layout.batch, layout.channels, layout.height, layout.width)
        strides = (layout.sample, 1, layout.row, layout.column)
        return self._strided(source.view, size, strides)

    def rows(self, view: View, layout: Layout) -> Tensor:
        """Dense pixels as (samples, height, width, channels)."""
        size = (layout.batch, layout.height, layout.width, layout.channels)
        whole = self.arena.tensor(View(view.buffer, _flat(view)))
        return whole.view(size)

    def _strided(self, view: View, size: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        meta = view.meta.as_strided(size, strides, view.meta.storage_offset())
        return self.arena.tensor(View(view.buffer, meta))

    def table(self, rounding: Rounding) -> StepTable:
        count = self.numbers.count
        scale = self.columns[rounding.column]
        zero = self.columns[count + rounding.column]
        smooth = None if rounding.smooth is None else rounding.smooth.values
        return StepTable(scale, zero, self.numbers.step, rounding.top, smooth)

    def codes(self, output: Output) -> RoundedRows | None:
        """The codes that an output stores; None for floats."""
        if output.rounding is None or output.sums is None:
            return None
        return self.rounded(output.view, output.sums, output.layout, output.rounding)

    def rounded(self, view: View, sums: View, layout: Layout, rounding: Rounding) -> RoundedRows:
        totals = self.arena.tensor(sums).view(layout.batch, layout.height, layout.width)
        return RoundedRows(self.rows(view, layout), totals, layout.channels, self.table(rounding))


def _flat(view: View) -> Tensor:
    """All elements of a dense view, in the order of memory."""
    return view.meta.as_strided((view.meta.numel(),), (1,), view.meta.storage_offset())


def _moments(step: MomentsStep, places: Places) -> NormMoments:
    x, *joined = map(places.image, step.sources)
    assert x is not None
    norm = GroupNormWeights(step.groups, step.epsilon, step.weight, step.bias)
    return NormMoments(x, joined[0] if joined else None, norm)


def stream_launch(
    step: StreamStep, places: Places, moments: NormMoments | None
) -> Callable[[], None]:
    """One launch for each output."""
    x, *joined = map(places.image, step.sources)
    assert x is not None
    other = joined[0] if joined else None
    times = places.image(step.times)
    outputs = [
        (output, places.codes(output), places.rows(output.view, output.layout))
        for output in step.outputs
    ]

    def run() -> None:
        norm = None if moments is None else moments.norm
        found = None if moments is None else moments.found
        for output, codes, rows in outputs:
            stream = ReadPixels(x, other, norm, found, step.activation, times, output.upsample)
            border = (output.padding.above, output.padding.left)
            store_stream(stream, rows, codes, border)

    return run


def normed_launch(step: LayerNormStep, places: Places) -> Callable[[], None]:
    """One launch for each output."""
    image = places.image(step.source)
    assert image is not None
    x = image.flatten(2).transpose(1, 2)
    vectors = (places.tensor(step.gain), places.tensor(step.shift))
    norm = LayerNormWeights(step.epsilon, step.weight, step.bias, *vectors)
    outputs = [
        (places.codes(output), places.rows(output.view, output.layout)) for output in step.outputs
    ]

    def run() -> None:
        for codes, rows in outputs:
            store_normed(x, norm, rows, codes)

    return run


def product_launch(step: GemmStep, places: Places) -> Callable[[], None]:
    """A product, with the launch that sets its sums of codes to zero where it stores codes."""
    assert isinstance(step.weight, ResidentWeight)
    assert step.rounding is not None
    assert step.sums is not None
    weight = step.weight
    layout = step.output.layout
    codes = places.rounded(step.codes, step.sums, step.codes_layout, step.rounding)
    window = Window(step.kernel, step.stride, step.dilation)
    if window.is_flat:
        size = (layout.batch, layout.height, layout.width)
        sums = codes.sums.view(size)
        codes = RoundedRows(codes.data.view(*size, -1), sums, codes.channels, codes.table)
    dense = Layout(layout.batch, layout.height, layout.width, weight.rows, 0, 0, 0)
    residual = None if step.residual is None else places.rows(step.residual, dense)
    epilogue = Epilogue(
        step.bias,
        places.tensor(step.per_sample),
        step.activation,
        places.tensor(step.gate),
        residual,
        step.factor,
    )
    stored = places.codes(step.output)
    rows = places.rows(step.output.view, layout)
    if stored is None:
        to = StoredRows(rows)
        return lambda: multiply_into(codes, weight, epilogue, to, window)
    to = StoredRows(stored.data, stored.sums, stored.table)
    rest = stored.data[..., weight.rows :]

    def run() -> None:
        stored.sums.zero_()
        if rest.numel():
            rest.zero_()
        multiply_into(codes, weight, epilogue, to, window)

    return run


def attention_launch(step: AttentionStep, places: Places) -> Callable[[], None]:
    operands = [places.arena.tensor(view) for view in (step.query, step.key, step.value)]
    tables = {name: places.table(rounding) for name, rounding in step.roundings.items()}
    out = places.arena.tensor(step.output)
    bias = places.tensor(step.bias)
    given = AttentionTables(**tables, adaptive=step.adaptive)
    return lambda: _attend(operands, given, bias, step.factor, out)


def _attend(
    operands: list[Tensor],
    tables: AttentionTables,
    bias: Tensor | None,
    factor: float,
    out: Tensor,
) -> None:
    attend(operands[0], operands[1], operands[2], tables, bias, factor, out)


def features_launch(step: FeaturesStep, places: Places) -> Callable[[], None]:
    place = places.arena.tensor(step.output)
    table = step.table
    now = places.numbers.step
    return lambda: _copy_features(table, now, place)


def _copy_features(table: Tensor, now: Tensor, place: Tensor) -> None:
    place.copy_(torch.index_select(table, 0, now).expand_as(place))
