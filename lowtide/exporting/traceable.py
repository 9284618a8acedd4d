"""A packed denoiser as a graph of plain operators: what converters of other runtimes can follow.

Within `traceable`, its packed layers and quantizers call the two operators of operators.py, and its
caches look their features up by a step that is a tensor. TracedDenoiser finds that step from the
timestep, as the clock does. Nothing of the model itself changes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide import runtime
from lowtide.exporting.stored_values import stored_features, stored_values_of
from lowtide.exporting.traced_operators import rounded_input
from lowtide.exporting.trial_calls import with_times
from lowtide.formats import Affine
from lowtide.kernels import divide
from lowtide.models import Architecture, Arguments
from lowtide.models.trace import flat_inputs
from lowtide.nn.clock import HALF, Clock, at_step, find_clock
from lowtide.nn.feature_cache import Cached
from lowtide.nn.packed import Packed
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_features import PerRequest

TIMESTEP = "timestep"


class Traced(nn.Module):
    """What takes the place of a module, which it keeps out of its own state."""

    clock: Clock

    def __init__(self, replaced: Any):
        super().__init__()
        # Plain attributes: the tracer does not look into them.
        object.__setattr__(self, "replaced", replaced)
        object.__setattr__(self, "clock", replaced.clock)

    @property
    def index(self) -> Tensor:
        """The running step."""
        return self.clock.index


class TracedRounding(Traced):
    """Takes the place of a quantizer."""

    replaced: Quantizer

    def __init__(self, quantizer: Quantizer):
        super().__init__(quantizer)
        self.affine = quantizer.format if quantizer.enabled else None
        if quantizer.has_range:
            clock = quantizer.clock
            steps = slice(None) if quantizer.per_step else 0
            self.scale = clock.scale[quantizer.row, steps].clone()
            self.zero = clock.zero[quantizer.row, steps].clone()

    def forward(self, x: Tensor) -> Tensor:
        form = self.affine
        if not isinstance(form, Affine):
            return self.replaced(x)
        if not self.replaced.per_step:
            return rounded_input(x, self.scale, self.zero, form.top)
        scale = at_step(self.scale, self.index)
        return rounded_input(x, scale, at_step(self.zero, self.index), form.top)


class TracedProduct:
    """The product of a packed layer, which calls it instead of its operator."""

    def __init__(self, layer: Packed, rounding: nn.Module):
        self.layer = layer
        self.rounding = rounding
        self.weight = stored_values_of(layer)
        by_channel = [1] * (layer.weight_dimensions - 2)
        self.smooth = layer.tables()[-1].clone().reshape(-1, *by_channel)

    def __call__(self, input: Tensor) -> Tensor:
        layer = self.layer
        x = self.rounding(divide(input, self.smooth))
        values = self.weight.values(x)
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(x, values, layer.bias)
        return F.linear(x, values, layer.bias)


class TracedFeatures(Traced):
    """Takes the place of a feature cache: a row of its table, by the step."""

    replaced: Cached

    def __init__(self, cache: Cached):
        super().__init__(cache)
        self.layer = cache.layer if cache.plan.computed else None
        self.stored = stored_features(cache)
        self.chosen = cache.chosen.clone() if cache.plan.computed else None

    def forward(self, x: Tensor) -> Tensor:
        table = self.replaced.values if self.stored is None else self.stored.values(x)
        features = at_step(table, self.index).expand(x.shape[0], -1)
        if self.layer is None or self.chosen is None:
            return features
        return torch.where(at_step(self.chosen, self.index), features, self.layer(x))


class TracedRequest(Traced):
    """Takes the place of features of a request: the layer computes them at each call, unrounded."""

    replaced: PerRequest

    def __init__(self, request: PerRequest):
        super().__init__(request)
        self.layer = request.layer
        self.exact = request.exact
        self.float_product = None
        if isinstance(self.layer, Packed):
            self.float_product = TracedProduct(self.layer, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        cache = self.replaced.plan.cache
        if cache is None:
            return self.layer(x)
        if not cache.computed:
            return (self.exact or self.layer)(x)
        # Without a second layer, the features are those of this one with its input in float.
        exact = self.exact or self.float_product or self.layer
        return torch.where(at_step(self.replaced.chosen, self.index), exact(x), self.layer(x))


REPLACED: Mapping[type[nn.Module], Callable[[Any], nn.Module]] = {
    Quantizer: TracedRounding,
    Cached: TracedFeatures,
    PerRequest: TracedRequest,
}


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """Within the context, the packed model runs layer by layer, on the operators of this room."""
    with ExitStack() as stack:
        stack.enter_context(runtime.plain(model))
        stack.enter_context(_without_hooks(model))
        for module in list(model.modules()):
            if isinstance(module, Packed):
                stack.callback(module.__dict__.__setitem__, "product", module.product)
                module.__dict__["product"] = TracedProduct(module, TracedRounding(module.input))
            for name, child in module._modules.items():
                if child is not None and type(child) in REPLACED:
                    stack.callback(module._modules.__setitem__, name, child)
                    module._modules[name] = REPLACED[type(child)](child)
        yield


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Leave out what runs before a call: the clock's hook and the request cache's.

    Both read the value of the timestep, which a graph does not have.
    """
    before = dict(model._forward_pre_hooks)
    model._forward_pre_hooks.clear()
    try:
        yield
    finally:
        model._forward_pre_hooks.update(before)


class TracedDenoiser(nn.Module):
    """The denoiser as exporters need it: positional tensors in, one tensor out.

    The timestep is one number for all samples, of shape (1,). For a timestep that the model does
    not know, the answer is NaN, because a graph cannot raise an error.
    """

    def __init__(
        self, model: nn.Module, arguments: Arguments, architecture: Architecture, samples: int
    ):
        """`arguments`: those of one call, by name. Its tensors become the graph's inputs.

        samples: of this call.
        """
        super().__init__()
        self.model = model
        self.arguments = arguments | {"return_dict": False}
        flat = flat_inputs(arguments)
        self.names = tuple(flat)
        rows = {name: architecture.rows(name, value, samples) for name, value in flat.items()}
        # The inputs whose first axis is the batch; positions of tokens have none.
        self.batched = frozenset(name for name in flat if rows[name] and name != TIMESTEP)

    def forward(self, *values: Tensor) -> Tensor:
        given = dict(zip(self.names, values, strict=True))
        clock = find_clock(self.model)
        # Added to the answer: rounding the sample would make a number of NaN.
        wrong = self._set_step(clock, given[TIMESTEP]) if clock.keyed else 0.0
        return self.model(**with_times(with_tensors(self.arguments, given)))[0] + wrong

    def _set_step(self, clock: Clock, timestep: Tensor) -> Tensor:
        """Set the running step, and return 0, or NaN where no step has this timestep."""
        known = clock.timesteps[: len(clock.known)].float()
        away = (known - timestep.float() * clock.ticks).abs()
        clock.index = away.argmin()
        return torch.where(away.amin() <= HALF, 0.0, float("nan"))


@contextmanager
def running_step_kept(model: nn.Module) -> Iterator[None]:
    """A trace leaves its own tensor in the clock; the one before comes back afterwards."""
    clock = find_clock(model)
    before = clock.index
    # Before its first call, a loaded model has a step without data, which a tracer cannot copy.
    clock.index = torch.zeros((), dtype=torch.long)
    try:
        yield
    finally:
        clock.index = before


def with_tensors(
    arguments: Arguments, tensors: Mapping[str, Tensor], prefix: str = ""
) -> Arguments:
    """The arguments of a call with its tensors, which have dotted names, replaced by these."""
    replaced: Arguments = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            value = with_tensors(dict(value), tensors, f"{prefix}{name}.")
        replaced[name] = tensors.get(prefix + name, value)
    return replaced
