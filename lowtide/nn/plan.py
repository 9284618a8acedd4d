"""The plan: which layer holds which formats, as JSON; a checkpoint's skeleton is built from it."""

import json
from dataclasses import dataclass, field, replace

from lowtide.formats import Affine, Format, format_from_json, format_to_json
from lowtide.settings import Settings

FORMAT_VERSION = 2


@dataclass(frozen=True)
class LayerPlan:
    """The formats of one layer's weight and input; None is float.

    `smooth`: the layer divides its input channels by a table first, and its weights are multiplied by it.
    """

    weight: Format | None
    input: Format | None
    per_step: bool = False
    smooth: bool = False


@dataclass(frozen=True)
class CachePlan:
    """A cache of `width` values for each step, in `chunks` that have a range each; None keeps float32.

    `computed` says that at some steps the layer itself answers, `kept` that it stays in float to rebuild the cache from:
    either way it is in the checkpoint.
    """

    width: int
    format: Affine | None
    chunks: int = 1
    computed: bool = False
    kept: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything a skeleton needs: formats by layer and by attention, the calibrated timesteps, and what stayed in float.

    What was rewritten comes first: `splits` (layer: channels of its first half), `cached` temporal layers, `blank` ones that
    nobody listens to any more (layer: width), and for how many channels of the answer there is a correction.
    `requests` are temporal layers that answer once for all steps of a request, with what they read; `times` are the
    timesteps as the denoiser hears them, unrounded.
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
    requests: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def keyed(self) -> bool:
        """Whether anything depends on the timestep, so that an unknown one is an error."""
        return bool(self.cached or self.corrected or self.requests or self.per_step)

    @property
    def per_step(self) -> bool:
        """Whether any input has a range for each step."""
        plans = [
            *self.layers.values(),
            *(part for parts in self.attentions.values() for part in parts.values()),
        ]
        return any(each.per_step and each.input for each in plans)

    def to_json(self) -> str:
        """Compact, because it goes into file headers: each different layer plan once, layers by its number."""
        kinds: dict[LayerPlan, int] = {}

        def number(layer: LayerPlan) -> int:
            return kinds.setdefault(layer, len(kinds))

        data = dict(self.__dict__)
        data["layers"] = {name: number(layer) for name, layer in self.layers.items()}
        data["attentions"] = {
            name: {part: number(of) for part, of in parts.items()}
            for name, parts in self.attentions.items()
        }
        reasons = {
            why: [name for name, other in self.left.items() if other == why]
            for why in self.left.values()
        }
        data |= {"left": reasons, "kinds": [layer_to_json(kind) for kind in kinds]}
        data["cached"] = {
            name: cache.__dict__ | {"format": format_to_json(cache.format)}
            for name, cache in self.cached.items()
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        data = json.loads(text)
        kinds = [layer_from_json(kind) for kind in data.pop("kinds")]
        data["layers"] = {name: kinds[number] for name, number in data["layers"].items()}
        data["attentions"] = {
            name: {part: kinds[number] for part, number in parts.items()}
            for name, parts in data["attentions"].items()
        }
        left = {name: why for why, names in data["left"].items() for name in names}
        cached = {
            name: CachePlan(**cache | {"format": format_from_json(cache["format"])})
            for name, cache in data["cached"].items()
        }
        data |= {name: tuple(data[name]) for name in ("timesteps", "times")}
        data["requests"] = {name: tuple(reads) for name, reads in data["requests"].items()}
        return cls(**data | {"left": left, "cached": cached})


def summarised(plan: Plan, settings: Settings) -> Plan:
    """The plan with the few words that config.json repeats."""
    names = ("weights", "inputs", "profile", "steps")
    summary = {name: getattr(settings, name) for name in names} | {"layers": len(plan.layers)}
    return replace(plan, summary=summary)


def layer_to_json(layer: LayerPlan) -> dict:
    kinds = {"weight": format_to_json(layer.weight), "input": format_to_json(layer.input)}
    return kinds | {"per_step": layer.per_step, "smooth": layer.smooth}


def layer_from_json(data: dict) -> LayerPlan:
    return LayerPlan(
        format_from_json(data["weight"]),
        format_from_json(data["input"]),
        data["per_step"],
        data["smooth"],
    )
