"""The plan: the formats of each layer, as JSON. A checkpoint's skeleton is built from it."""

import json
from dataclasses import dataclass, field, replace
from itertools import chain
from operator import itemgetter
from typing import Any, TypedDict

from lowtide.errors import BadInput
from lowtide.formats import (
    Affine,
    FormatJson,
    InputFormat,
    Mixed,
    OwnRange,
    WeightFormat,
    format_from_json,
    format_to_json,
)
from lowtide.nn.plan_checks import check_plan_fields
from lowtide.settings import Settings

FORMAT_VERSION = 6  # of the checkpoint; a file of a later version is refused
# 3: cached features of requests; 4: side branches; 5: recorded architectures, the order as a list,
# times only where they are not the timesteps; 6: checksums instead of hashes.
OLDEST_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """The formats of one layer's weight and input; None is float.

    `smooth`: the layer first divides its input channels by a table, and its weights are multiplied
    by the same table.
    """

    weight: WeightFormat | None
    input: InputFormat | None
    per_step: bool = False
    smooth: bool = False

    @property
    def has_range(self) -> bool:
        """Whether the range of its input is stored."""
        return self.input is not None and not isinstance(self.input, OwnRange)


@dataclass(frozen=True)
class CachePlan:
    """A cache of `width` values for each step, in `chunks` with a range each.

    Without a format, the values are float32. `computed`: some steps compute the layer itself.
    `kept`: the layer stays in float, so that the cache can be rebuilt. In both cases the checkpoint
    holds the layer.
    """

    width: int
    format: Affine | None
    chunks: int = 1
    computed: bool = False
    kept: bool = False


@dataclass(frozen=True)
class RequestPlan:
    """A temporal layer whose features are computed once a request, for all steps at once.

    reads: the inputs of the model that it depends on.
    cache: how its features are rounded; None: they are the layer's own answers, unchanged.
    exact: the formats of a second layer beside it, which the cache is computed by; None: the layer
        itself computes it, with its input in float.
    """

    reads: tuple[str, ...]
    cache: CachePlan | None = None
    exact: LayerPlan | None = None


@dataclass(frozen=True)
class SidePlan:
    """A low-rank branch in float beside a packed layer: a LoRA that was fused."""

    rank: int
    bias: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything that a skeleton needs.

    layers, attentions   formats of each layer, and of each part of each attention
    timesteps            the calibrated timesteps as integers, `ticks` of them to a unit
    times                the same timesteps as the denoiser receives them, unrounded
    method, summary      the name of the method, and the settings that config.json repeats
    left                 what stays in float (layer: reason)
    splits               layers on two concatenated inputs (layer: channels of the first input)
    cached               temporal layers that are replaced by a cache
    blank                temporal layers whose output is no longer used (layer: width)
    corrected            the number of output channels that have a correction
    requests             temporal layers that compute all steps of a request at once
    sides                low-rank branches beside packed layers
    example              a recorded architecture (models/described.py), of a class that is unknown
    """

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    attentions: dict[str, dict[str, LayerPlan]] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()
    times: tuple[float, ...] = ()
    ticks: int = 1
    method: str = ""
    summary: dict[str, object] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    splits: dict[str, int] = field(default_factory=dict)
    cached: dict[str, CachePlan] = field(default_factory=dict)
    blank: dict[str, int] = field(default_factory=dict)
    corrected: int = 0
    requests: dict[str, RequestPlan] = field(default_factory=dict)
    sides: dict[str, SidePlan] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)

    @property
    def keyed(self) -> bool:
        """Whether anything depends on the timestep, so that an unknown one is an error."""
        return bool(self.cached or self.corrected or self.requests or self.per_step)

    @property
    def per_step(self) -> bool:
        """Whether any input has a range for each step."""
        return any(each.per_step and each.input for each in self.all_plans())

    def all_plans(self) -> list[LayerPlan]:
        """The plans of all layers, then those of all parts of attentions."""
        parts = chain.from_iterable(parts.values() for parts in self.attentions.values())
        return [*self.layers.values(), *parts]

    def _whole_times(self) -> tuple[float, ...]:
        """What the denoiser receives at the timesteps, where nothing was rounded."""
        return tuple(timestep / self.ticks for timestep in self.timesteps)

    def to_json(self) -> str:
        """Compact JSON, because it is part of file headers.

        Each different layer plan is written once, and layers refer to it by its number. Reasons to
        stay in float are written once too, each with its layers. The order of the layers, which
        the rows of the clock's tables have, is a list of its own: keys of JSON have no order.
        """
        numbers: dict[LayerPlan, int] = {}

        def number(layer: LayerPlan) -> int:
            return numbers.setdefault(layer, len(numbers))

        data: dict[str, object] = dict(self.__dict__)
        data["layers"] = {name: number(layer) for name, layer in self.layers.items()}
        data["attentions"] = {
            name: {part: number(layer) for part, layer in parts.items()}
            for name, parts in self.attentions.items()
        }
        data["order"] = _order_of(list(self.layers)) + _order_of(_parts_of(self.attentions))
        data["left"] = _names_by_reason(self.left)
        data["kinds"] = [_layer_to_json(layer) for layer in numbers]
        data["cached"] = {name: _cache_to_json(cache) for name, cache in self.cached.items()}
        data["requests"] = {name: _request_to_json(each) for name, each in self.requests.items()}
        if self.times and self.times == self._whole_times():
            del data["times"]  # they are the timesteps, and so can be left out
        del data["sides"]
        if not self.example:
            del data["example"]
        if self.sides:
            data["sides"] = {name: side.__dict__ for name, side in self.sides.items()}
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The plan of a checkpoint. An error names the field that no plan can have so."""
        try:
            data = check_plan_fields(json.loads(text))
        except (ValueError, RecursionError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(
                f"found a plan that is not JSON ({error})",
                "the one that was saved",
                "copy or download the checkpoint again",
            ) from error
        has_times = "times" in data
        _put_in_order(data)
        kinds = [_layer_from_json(kind) for kind in data.pop("kinds")]
        data["layers"] = {name: kinds[number] for name, number in data["layers"].items()}
        data["attentions"] = {
            name: {part: kinds[number] for part, number in parts.items()}
            for name, parts in data["attentions"].items()
        }
        left: dict[str, str] = {}
        for reason, names in data["left"].items():
            left |= dict.fromkeys(names, reason)
        data["left"] = left
        data["cached"] = {name: _cache_from_json(cache) for name, cache in data["cached"].items()}
        data["timesteps"] = tuple(data["timesteps"])
        data["times"] = tuple(data.get("times", ()))
        requests = data["requests"].items()
        data["requests"] = {name: _request_from_json(request) for name, request in requests}
        sides = data.pop("sides", {}).items()
        data["sides"] = {name: SidePlan(**side) for name, side in sides}
        plan = cls(**data)
        return plan if has_times else replace(plan, times=plan._whole_times())


Part = tuple[str, str]  # of an attention: its name, and that of the part


def _parts_of(attentions: dict[str, dict[str, Any]]) -> list[Part]:
    """The parts of all attentions, in order."""
    pairs = ([(name, part) for part in parts] for name, parts in attentions.items())
    return list(chain.from_iterable(pairs))


def _order_of(names: list[str] | list[Part]) -> list[int]:
    """The place of each name, for the names in alphabetical order."""
    places = {name: place for place, name in enumerate(names)}
    return [places[name] for name in sorted(places)]


def _put_in_order(data: dict[str, Any]) -> None:
    """Give layers and attentions the written order. Files before version 5 have that of keys."""
    order: list[int] | None = data.pop("order", None)
    if order is None:
        return
    layers = data["layers"]
    attentions = data["attentions"]
    pairs = zip(sorted(layers), order, strict=False)
    data["layers"] = {name: layers[name] for name, _ in sorted(pairs, key=itemgetter(1))}
    parts = zip(sorted(_parts_of(attentions)), order[len(layers) :], strict=True)
    ordered: dict[str, dict[str, int]] = {}
    for (name, part), _ in sorted(parts, key=itemgetter(1)):
        ordered.setdefault(name, {})[part] = attentions[name][part]
    ordered |= {name: {} for name, parts_of_it in attentions.items() if not parts_of_it}
    data["attentions"] = ordered


def _names_by_reason(left: dict[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in left.items():
        names.setdefault(reason, []).append(name)
    return names


def with_summary(plan: Plan, settings: Settings) -> Plan:
    """The plan with the few settings that config.json repeats."""
    names = ("weights", "inputs", "profile", "steps")
    summary = {name: getattr(settings, name) for name in names} | {"layers": len(plan.layers)}
    for name in ("group", "keep_float"):
        if value := getattr(settings, name):
            summary[name] = list(value) if isinstance(value, tuple) else value
    return replace(plan, summary=summary)


def _cache_to_json(cache: CachePlan) -> dict[str, object]:
    return {**cache.__dict__, "format": format_to_json(cache.format)}


def _cache_from_json(data: dict[str, Any]) -> CachePlan:
    fields: dict[str, Any] = {**data, "format": format_from_json(data["format"])}
    return CachePlan(**fields)


def _request_to_json(request: RequestPlan) -> dict[str, object] | list[str]:
    """As in version 2, a layer whose features are not rounded is the list of what it reads."""
    if request.cache is None:
        return list(request.reads)
    exact = None if request.exact is None else _layer_to_json(request.exact)
    return {"reads": request.reads, "cache": _cache_to_json(request.cache), "exact": exact}


def _request_from_json(data: dict[str, Any] | list[str]) -> RequestPlan:
    if isinstance(data, list):
        return RequestPlan(tuple(data))
    exact = None if data["exact"] is None else _layer_from_json(data["exact"])
    return RequestPlan(tuple(data["reads"]), _cache_from_json(data["cache"]), exact)


class _LayerJson(TypedDict):
    """A layer plan as JSON."""

    weight: FormatJson | None
    input: FormatJson | None
    per_step: bool
    smooth: bool


def _layer_to_json(layer: LayerPlan) -> _LayerJson:
    return {
        "weight": format_to_json(layer.weight),
        "input": format_to_json(layer.input),
        "per_step": layer.per_step,
        "smooth": layer.smooth,
    }


def _layer_from_json(data: _LayerJson) -> LayerPlan:
    weight = format_from_json(data["weight"])
    inputs = format_from_json(data["input"])
    assert isinstance(weight, WeightFormat | None)
    assert not isinstance(inputs, Mixed)
    return LayerPlan(weight, inputs, per_step=data["per_step"], smooth=data["smooth"])
