"""The request cache: temporal features that are computed once per request, for all steps at once.

It is for temporal layers that read a label or a text as well as the timestep. No cache made before
the request can hold their features, but within a request only the timestep changes. At the first
call of a request, the layers run on all calibrated timesteps in one batch, and later calls look up
their step. Features that the plan caches are stored as codes (nn/request_features.py). A call with
other conditions starts a new request. The timesteps of another schedule are added when it first
runs. A timestep that is neither calibrated nor added is computed, so no feature is ever stale. Two
requests are stored at a time, for pipelines that call the denoiser once for each branch of
guidance.
"""

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowtide.nn.clock import find_clock
from lowtide.nn.feature_cache import one_row_each
from lowtide.nn.float_layers import linear_options, replace_module
from lowtide.nn.packed import packed_layer
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_features import PerRequest, StoredFeatures
from lowtide.nn.split import shape_adapter

if TYPE_CHECKING:
    from lowtide.models import Adapter

BRANCHES = 2


class RequestFeatures(NamedTuple):
    """The conditions of a request, and its features by layer: steps x batch x width, or codes."""

    conditions: dict[str, Tensor]
    features: dict[str, Tensor | StoredFeatures]


class RequestCache:
    """The features of the running requests, the latest last, and the step of the running call."""

    def __init__(self, root: nn.Module, plan: Plan):
        self.root = root
        self.parameters = list(inspect.signature(root.forward).parameters)
        # Layers compute while `building`. While `collecting`, those whose features are stored as
        # codes do not round them, because their grids are stored too.
        self.building = False
        self.collecting = False
        self.set_plan(plan)

    def set_plan(self, plan: Plan) -> None:
        """Use the timesteps of this plan from now on, and forget the running requests."""
        self.plan = plan
        self.steps = {time: step for step, time in enumerate(plan.times)}
        self.requests: list[RequestFeatures] = []
        self.step: int | None = None

    def add(self, times: list[float]) -> None:
        """Use these timesteps too, and forget the running requests, which lack them."""
        new = [time for time in times if time not in self.steps]
        self.steps |= {time: len(self.steps) + place for place, time in enumerate(new)}
        self.requests = []

    def before_call(
        self, root: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> None:
        """Find the step and the request of a denoiser call; build the features of a new request.

        A call that is recorded can compare no conditions: its layers compute their features.
        """
        self.step = None
        if torch.compiler.is_compiling():
            return
        inputs = dict(zip(self.parameters, args, strict=False)) | kwargs
        timestep = torch.as_tensor(inputs["timestep"])
        self.step = self.step_of(timestep.detach().cpu().double().flatten().tolist())
        if self.step is None:
            return
        names = set().union(*(each.reads for each in self.plan.requests.values())) - {"timestep"}
        conditions = {name: _nested(inputs, name) for name in sorted(names)}
        latest = self._request(conditions)
        others = [request for request in self.requests if request is not latest]
        self.requests = [*others[1 - BRANCHES :], latest or self.build(conditions, timestep)]

    def _request(self, conditions: dict[str, Tensor]) -> RequestFeatures | None:
        """The stored request with these conditions."""
        for request in self.requests:
            if same_conditions(conditions, request.conditions):
                return request
        return None

    def step_of(self, values: list[float]) -> int | None:
        """The step of exactly this timestep, if all samples share it."""
        return self.steps.get(values[0]) if len(set(values)) == 1 else None

    @cached_property
    def adapter(self) -> "Adapter":
        return shape_adapter(self.root, self.plan.splits, self.plan.example)

    @torch.no_grad()
    def build(self, conditions: dict[str, Tensor], timestep: Tensor) -> RequestFeatures:
        """Run the temporal units on every step of this request, as one batch."""
        batch = len(next(iter(conditions.values())))
        times = torch.tensor(list(self.steps), dtype=torch.float64)
        rows = {
            name: value.repeat(len(times), *[1] * (value.dim() - 1))
            for name, value in conditions.items()
        }
        # A pipeline may pass the timestep on the CPU, and the units read it beside conditions.
        device = next(iter(conditions.values())).device
        rows["timestep"] = times.repeat_interleave(batch).to(timestep.dtype).to(device)
        clock = find_clock(self.root)
        running_index = clock.index
        clock.set(rows["timestep"])
        self.building = True
        self.collecting = True
        features = self._run_units(rows, len(times))
        self.building = False
        self.collecting = False
        clock.index = running_index
        copies = {name: value.clone() for name, value in conditions.items()}
        return RequestFeatures(copies, features)

    def _run_units(self, rows: dict[str, Tensor], steps: int) -> dict[str, Tensor | StoredFeatures]:
        """The features of each layer; `rows` are the samples of all steps."""
        features: dict[str, Tensor | StoredFeatures] = {}
        for unit in self.adapter.temporal():
            if not self.plan.requests.keys() & set(unit.features):
                continue
            graph = self.adapter.temporal_graph(unit, len(rows["timestep"]))
            outputs = graph.replay(self.root, {name: rows[name] for name in unit.reads})
            for name, answer in zip(unit.features, outputs, strict=True):
                output = one_row_each(answer, len(rows["timestep"]))
                features[name] = self._stored(name, output, steps)
        return features

    def _stored(self, name: str, output: Tensor, steps: int) -> Tensor | StoredFeatures:
        """A layer's features, (steps * batch) x width, as they are kept."""
        layer = self.root.get_submodule(name)
        assert isinstance(layer, PerRequest)
        if layer.codes_plan is None:
            return output.unflatten(0, (steps, len(output) // steps))
        return StoredFeatures.of(output, layer.codes_plan, steps)

    def feature(self, name: str) -> Tensor | None:
        """The feature of a layer at the running step, batch x width, or None where it is computed.

        While features are being built, the layers compute them.
        """
        if self.building or self.step is None:
            return None
        features = self.requests[-1].features[name]
        if isinstance(features, StoredFeatures):
            return features.at(self.step)
        return features[self.step]


def _nested(inputs: Mapping[str, Any], name: str) -> Tensor:
    """The tensor with that dotted name."""
    first, _, rest = name.partition(".")
    return _nested(inputs[first], rest) if rest else inputs[first]


def same_conditions(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        _same_tensor(value, other[name]) for name, value in one.items()
    )


def _same_tensor(one: Tensor, other: Tensor) -> bool:
    """Whether device, dtype and values are the same.

    Conditions on another device are another request: the stored features are on the wrong device,
    and `torch.equal` would raise.
    """
    if (one.device, one.dtype) != (other.device, other.dtype):
        return False
    return torch.equal(one, other)


def add_request_cache(root: nn.Module, plan: Plan, adapter: "Adapter | None" = None) -> None:
    """Put a cache before the layers that the plan names, and update it before each denoiser call.

    The clock's own hook has to be registered before, because hooks run in that order. `adapter`: of
    the float model, where it has no configuration that the adapter could be made from.
    """
    cache = RequestCache(root, plan)
    if adapter is not None:
        cache.adapter = adapter
    for name in plan.requests:
        layer = root.get_submodule(name)
        if not isinstance(layer, PerRequest):
            layer = per_request(root, name, plan)
            replace_module(root, name, layer)
        object.__setattr__(layer, "cache", cache)
    root.register_forward_pre_hook(cache.before_call, with_kwargs=True)


def per_request(root: nn.Module, name: str, plan: Plan) -> PerRequest:
    """The layer of that name with what the plan puts beside it, which a checkpoint then fills."""
    request = plan.requests[name]
    layer = root.get_submodule(name)
    clock = find_clock(root)
    exact = None
    if request.exact is not None:
        exact = _empty_linear(layer, request.exact, Quantizer(None, clock))
    return PerRequest(name, layer, request, clock, exact)


def _empty_linear(like: nn.Module, plan: LayerPlan, inputs: Quantizer) -> nn.Module:
    """A linear layer of the same shape in the formats of the plan, without its data."""
    assert isinstance(like, nn.Linear)
    if plan.weight is None:
        return nn.Linear(**linear_options(like))
    return packed_layer(like, plan.weight, inputs, smooth=plan.smooth)


def request_caches(root: nn.Module) -> set[RequestCache]:
    """The request caches of this model, each once."""
    layers = (module for module in root.modules() if isinstance(module, PerRequest))
    return {layer.cache for layer in layers if layer.cache is not None}
