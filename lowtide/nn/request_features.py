"""Temporal features of a request: how a layer computes them, and how they are kept.

Cache-based maintenance where features depend on a label or a text: the float block computes them,
and each is rounded on a grid of its own, for each step, sample and part, as in nn/feature_cache.py.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.formats import Affine, Grid
from lowtide.kernels import Spec, divide, linear
from lowtide.nn.clock import Clock, step_of_rows
from lowtide.nn.feature_cache import quantize_features
from lowtide.nn.packed import PackedLinear
from lowtide.nn.plan import CachePlan, RequestPlan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantLinear

if TYPE_CHECKING:
    from lowtide.nn.request_cache import RequestCache


class PerRequest(nn.Module):
    """Replaces a temporal layer: its output is from the request cache, or computed here.

    Until packing there is no cache, and every call computes its own rows.
    """

    cache: "RequestCache | None"
    clock: Clock
    chosen: Tensor  # whether a step reads the cache, (steps,), where some steps compute the layer

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        plan: RequestPlan,
        clock: Clock,
        exact: nn.Module | None = None,
    ):
        super().__init__()
        self.name = name
        self.layer = layer
        self.exact = exact
        self.plan = plan
        self.quantized = True
        # Both refer to the whole model; plain attributes keep them out of the module's state.
        object.__setattr__(self, "clock", clock)
        object.__setattr__(self, "cache", None)
        if plan.cache is not None and plan.cache.computed:
            self.register_buffer("chosen", torch.ones(len(clock.known), dtype=torch.bool))

    @property
    def codes_plan(self) -> CachePlan | None:
        """How all features are stored as codes; None where some or all of them are floats."""
        cache = self.plan.cache
        return None if cache is None or cache.computed or cache.format is None else cache

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return self.layer(x)
        if self.cache is None:
            return self.computed(x)
        if self.cache.collecting and self.codes_plan:
            return self._exact_answer(x)
        feature = self.cache.feature(self.name)
        if feature is None:
            return self.computed(x)
        # Several rows belong to one sample, such as the frames of a video.
        return feature.to(x.dtype).repeat_interleave(len(x) // len(feature), 0)

    def computed(self, x: Tensor) -> Tensor:
        """The features of these rows as the cache returns them, rows x width."""
        cache = self.plan.cache
        if cache is None:
            return self.layer(x)
        maintained = round_features(self._exact_answer(x), cache)
        if not cache.computed:
            return maintained
        index = step_of_rows(self.clock.index.to(self.chosen.device), len(x))
        return torch.where(self.chosen[index].reshape(-1, 1), maintained, self.layer(x))

    def _exact_answer(self, x: Tensor) -> Tensor:
        """What the cache is computed from: the second layer, or this one with a float input."""
        if self.exact is not None:
            return self.exact(x)
        shared = self.plan.cache is not None and self.plan.cache.computed
        return _on_float_input(self.layer, x) if shared else self.layer(x)

    def set_precision(self, precision: Precision) -> None:
        """In float, the layer itself runs; a job calls this."""
        self.quantized = precision.weights

    def take_steps(self, steps: Tensor) -> None:
        """Replace the steps: each new one does as the old step that `steps` names."""
        if self.plan.cache is not None and self.plan.cache.computed:
            self.chosen = self.chosen[steps.to(self.chosen.device)]

    def add(self, nearest: Tensor) -> None:
        """Append steps, each of which does as the step that `nearest` names."""
        if self.plan.cache is not None and self.plan.cache.computed:
            old = torch.arange(len(self.chosen))
            self.take_steps(torch.cat([old, nearest.cpu()]))


def _on_float_input(layer: nn.Module, x: Tensor) -> Tensor:
    """The answer of a linear layer with its weight as it is, and without rounding its input."""
    if isinstance(layer, QuantLinear):
        return F.linear(divide(x, layer.smooth), layer.effective_weight(), layer.bias)
    if isinstance(layer, PackedLinear):
        spec = replace(Spec.of(layer.spec), input_bits=0).flat()
        return linear(x, layer.codes(), layer.tables(), [], spec, layer.bias)
    return layer(x)


def round_features(features: Tensor, plan: CachePlan) -> Tensor:
    """Float features, rows x width, each row and part rounded on its own grid.

    The gradient passes straight through the rounding.
    """
    if plan.format is None:
        return features
    rounded = StoredFeatures.of(features.detach(), plan, 1).at(0).to(features.dtype)
    if features.requires_grad and torch.is_grad_enabled():
        return rounded + (features - features.detach())
    return rounded


class StoredFeatures(NamedTuple):
    """Features as codes, steps x rows x columns, and the grid of each row."""

    format: Affine
    codes: Tensor
    grid: Grid
    width: int

    @classmethod
    def of(cls, features: Tensor, plan: CachePlan, steps: int) -> "StoredFeatures":
        """Round float features, (steps * samples) x width, which are in the order of the steps."""
        assert plan.format is not None, "these features stay in float"
        codes, grid = quantize_features(features, plan)
        rows = len(codes) // steps
        each = Grid(grid.scale.unflatten(0, (steps, rows)), grid.zero.unflatten(0, (steps, rows)))
        return cls(plan.format, codes.unflatten(0, (steps, rows)), each, plan.width)

    def at(self, step: int) -> Tensor:
        """The features of one step in float32, samples x width."""
        grid = Grid(self.grid.scale[step], self.grid.zero[step])
        return self.format.decode(self.codes[step], grid).reshape(-1, self.width)
