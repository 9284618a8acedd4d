"""Values that are not in memory yet, and what can still join them before they are.

A norm, an activation or a padding waits until somebody reads it: a layer reads codes, so the float
values of a norm are often never stored. A product waits for what follows it: a bias for each
sample, a gate, a residual.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lowtide.kernels import native_library
from lowtide.runtime.attention_step import AttentionStep
from lowtide.runtime.draft import Draft, Producer
from lowtide.runtime.layouts import (
    NO_PADDING,
    Layout,
    Padding,
    channel_axis,
    layout_of,
    pixel_shape,
    tokens_of,
)
from lowtide.runtime.memory import View, new_view
from lowtide.runtime.steps import (
    GemmStep,
    LayerNormStep,
    MomentsStep,
    Output,
    Source,
    StreamStep,
    TorchStep,
)

MOMENT_PIXELS = 256  # pixels that one chunk of a group norm's moments covers


@dataclass(frozen=True, eq=False)
class GroupNorm:
    groups: int
    epsilon: float
    weight: Tensor | None
    bias: Tensor | None


@dataclass(eq=False)
class Chain(Producer):
    """activation(norm(source)) * times, upsampled, padded. `sources` are side by side in channels.

    `activated`: what `times` multiplies, as a value of its own.
    `steps` holds the stream calls that exist already; a new reader is one more output of one.
    `codes` holds the outputs that are codes, by grid and shape.
    """

    sources: list[View]
    layouts: list[Layout]
    norm: GroupNorm | None = None
    activation: int = native_library.IDENTITY
    times: View | None = None
    activated: View | None = None
    upsample: int = 1
    padding: Padding = NO_PADDING
    steps: list[StreamStep] = field(default_factory=list)
    codes: dict[tuple, Output] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        return sum(layout.channels for layout in self.layouts)

    @property
    def is_plain(self) -> bool:
        return self.norm is None and self.times is None and self.is_unshaped

    @property
    def is_unshaped(self) -> bool:
        return self.upsample == 1 and self.padding == NO_PADDING

    def settle(self, draft: Draft, whole: View) -> None:
        if self.padding == NO_PADDING:
            self.store(draft, Output(whole, known(layout_of(whole.meta)), upsample=self.upsample))
        else:
            self._pad(draft, whole)

    def _pad(self, draft: Draft, whole: View) -> None:
        """Store the values without padding, and let torch pad them."""
        inner = replace(self, padding=NO_PADDING, steps=[], codes={})
        batch, channels, height, width = whole.shape
        padding = self.padding
        size = padding.within(height, width)
        source = draft.floats(
            draft.wait(pixel_shape(batch, *size, channels, whole.meta.dtype), inner)
        )
        amounts = (padding.left, padding.right, padding.above, padding.below)
        step = TorchStep("pad", F.pad, (source, amounts), {}, results=[whole], read=[source])
        draft.steps.append(step)

    def store(self, draft: Draft, output: Output) -> None:
        """Add an output to the latest stream, or to a new one."""
        layouts = [known(layout.reshaped(*output.source_size)) for layout in self.layouts]
        last = self.steps[-1] if self.steps else None
        if last is None or last.is_full() or last.sources[0].layout != layouts[0]:
            last = self._stream(draft, layouts)
        last.outputs.append(output)

    def _stream(self, draft: Draft, layouts: list[Layout]) -> StreamStep:
        """A new stream over the sources, in this layout."""
        step = StreamStep(_sources(draft, self.sources, layouts), self.activation)
        if self.norm is not None:
            step.gain, step.offset = self._moments(draft, self.norm)
        if self.times is not None:
            view = draft.floats(self.times)
            layout = known(layout_of(view.meta)).reshaped(*layouts[0].size)
            step.times = Source(view, known(layout))
        self.steps.append(step)
        draft.steps.append(step)
        return step

    def _moments(self, draft: Draft, norm: GroupNorm) -> tuple[View, View]:
        """The gain and the offset of each channel; their step is added once."""
        for step in self.steps:
            if step.gain is not None and step.offset is not None:
                return step.gain, step.offset
        first = self.layouts[0]
        blocks = max(1, -(-first.pixels // MOMENT_PIXELS))
        channels = self.channels
        gain = _floats(first.batch, channels)
        offset = _floats(first.batch, channels)
        partial = _floats(first.batch, blocks, 2, channels)
        lines = [known(layout.as_line()) for layout in self.layouts]
        sources = _sources(draft, self.sources, lines)
        fields = (norm.groups, norm.epsilon, norm.weight, norm.bias, gain, offset, partial, blocks)
        draft.steps.append(MomentsStep(sources, *fields))
        return gain, offset


def known(layout: Layout | None) -> Layout:
    """A layout that exists, because the call was taken only where it does."""
    assert layout is not None
    return layout


def _floats(*shape: int) -> View:
    return new_view(torch.empty(shape, device="meta"))


def _sources(draft: Draft, views: Sequence[View], layouts: Sequence[Layout]) -> list[Source]:
    pairs = zip(views, layouts, strict=True)
    return [Source(draft.floats(view), layout) for view, layout in pairs]


@dataclass(eq=False)
class NormedRows(Producer):
    """A layer norm, and the gain and shift of each sample that may follow it."""

    source: View
    layout: Layout
    epsilon: float
    weight: Tensor | None
    bias: Tensor | None
    gain: View | None = None
    shift: View | None = None
    steps: list[LayerNormStep] = field(default_factory=list)
    codes: dict[tuple, Output] = field(default_factory=dict)

    def settle(self, draft: Draft, whole: View) -> None:
        self.store(draft, Output(whole, known(tokens_of(whole.meta))))

    def store(self, draft: Draft, output: Output) -> None:
        """Add an output to the latest step, or to a new one."""
        last = self.steps[-1] if self.steps else None
        if last is None or last.is_full():
            last = self._step(draft)
        last.outputs.append(output)

    def _step(self, draft: Draft) -> LayerNormStep:
        source = Source(draft.floats(self.source), self.layout)
        for view in (self.gain, self.shift):
            if view is not None:
                draft.floats(view)
        step = LayerNormStep(source, self.epsilon, self.weight, self.bias, self.gain, self.shift)
        self.steps.append(step)
        draft.steps.append(step)
        return step


@dataclass(eq=False)
class Joined(Producer):
    """Two values side by side in their channels."""

    parts: list[View]

    def settle(self, draft: Draft, whole: View) -> None:
        axis = channel_axis(whole.meta)
        first = 0
        for part in self.parts:
            draft.floats(part)
            count = part.shape[axis]
            target = View(whole.buffer, whole.meta.narrow(axis, first, count))
            first += count
            step = TorchStep("copy", _same, (part,), {}, results=[target], read=[part])
            draft.steps.append(step)


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(eq=False)
class Product(Producer):
    """A layer's product that is not in the program yet, so its epilogue can still grow."""

    step: GemmStep

    def settle(self, draft: Draft, whole: View) -> None:
        step = self.step
        for view in (step.per_sample, step.gate, step.residual):
            if view is not None:
                draft.floats(view)
        draft.steps.append(step)

    def can_add_per_sample(self) -> bool:
        step = self.step
        free = step.per_sample is None and step.gate is None and step.residual is None
        return free and step.factor == 1.0

    @property
    def is_bare(self) -> bool:
        """Whether it is a product and a bias, and nothing has joined its epilogue."""
        step = self.step
        return (
            self.can_add_per_sample()
            and step.activation == native_library.IDENTITY
            and step.output.rounding is None
        )

    def can_gate(self) -> bool:
        return self.step.gate is None and self.step.residual is None and self.step.factor == 1.0

    def can_add_residual(self) -> bool:
        return self.step.residual is None and self.step.factor == 1.0


@dataclass(eq=False)
class Attended(Producer):
    """The result of an attention that is not in the program yet, so it can still be rounded."""

    step: AttentionStep

    def settle(self, draft: Draft, whole: View) -> None:
        draft.steps.append(self.step)
