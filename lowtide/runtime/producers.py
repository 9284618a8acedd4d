"""Values that are not in memory yet, and what can still join them before they are.

A norm, an activation or a padding waits until somebody reads it: a layer reads codes, so the float
values of a norm are often never stored. A product waits for what follows it: a bias for each
sample, a gate, a residual.
"""

from dataclasses import dataclass, field

from torch import Tensor

from lowtide.kernels import native_library
from lowtide.runtime.memory import Layout, View
from lowtide.runtime.steps import GemmStep, LayerNormStep, Output, Padding, StreamStep


@dataclass(frozen=True, eq=False)
class GroupNorm:
    groups: int
    epsilon: float
    weight: Tensor | None
    bias: Tensor | None


@dataclass(eq=False)
class Chain:
    """activation(norm(source)) * times, upsampled, padded. `sources` are side by side in channels.

    `steps` holds the stream calls that exist already; a new reader is one more output of one.
    """

    sources: list[View]
    layouts: list[Layout]
    norm: GroupNorm | None = None
    activation: int = native_library.IDENTITY
    times: View | None = None
    upsample: int = 1
    padding: Padding = Padding()
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
        return self.upsample == 1 and self.padding == Padding()


@dataclass(eq=False)
class Rows:
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


@dataclass(eq=False)
class Joined:
    """Two values side by side in their channels."""

    parts: list[View]


@dataclass(eq=False)
class Product:
    """A layer's product that is not in the program yet, so its epilogue can still grow."""

    step: GemmStep
    view: View

    def can_add_per_sample(self) -> bool:
        step = self.step
        free = step.per_sample is None and step.gate is None and step.residual is None
        return free and step.factor == 1.0

    def can_gate(self) -> bool:
        return self.step.gate is None and self.step.residual is None and self.step.factor == 1.0

    def can_add_residual(self) -> bool:
        return self.step.residual is None and self.step.factor == 1.0


Producer = Chain | Rows | Joined | Product
