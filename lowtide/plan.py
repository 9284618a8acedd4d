"""The settings a user chooses and the plan they lead to: which layer holds which formats, as JSON."""

import json
from dataclasses import asdict, dataclass, field, fields, replace

from lowtide.errors import BadInput
from lowtide.formats import Format, check_bits, format_from_json, format_to_json

FORMAT_VERSION = 1
PROFILES = ("full", "paper")


@dataclass(frozen=True)
class Settings:
    """What to quantize to, and how much to spend on it."""

    weights: int = 4
    inputs: int = 8
    steps: int = 50
    profile: str = "full"
    group: int | None = None
    images: int = 32
    kept: int = 25
    iters: int = 1000
    batch: int = 32
    range_iters: int = 0
    early_stop: bool = False
    memory: int = 256 << 20
    guidance: float | None = None
    size: int | None = None
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        check_bits(self.weights, "weights")
        check_bits(self.inputs, "inputs")
        if self.profile not in PROFILES:
            raise BadInput(f"found profile {self.profile!r}", " or ".join(PROFILES), "choose one")
        for name in ("steps", "images", "kept", "iters", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"found {name} {getattr(self, name)}", "at least 1", f"give a larger {name}")

    def with_(self, **changes: object) -> "Settings":
        return replace(self, **changes)


def settings_from(options: dict[str, object]) -> Settings:
    """Settings from keywords, with an error that names what exists."""
    names = [known.name for known in fields(Settings)]
    if unknown := sorted(set(options) - set(names)):
        raise BadInput(f"found setting {unknown[0]!r}", f"one of {', '.join(names)}", "check the spelling")
    return Settings(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})


@dataclass(frozen=True)
class LayerPlan:
    """The formats of one layer's weight and input; None is float."""

    weight: Format | None
    input: Format | None
    per_step: bool = False


@dataclass(frozen=True)
class Plan:
    """Everything a skeleton needs: formats by layer and by attention, the calibrated timesteps, and what stayed in float."""

    layers: dict[str, LayerPlan] = field(default_factory=dict)
    attentions: dict[str, dict[str, LayerPlan]] = field(default_factory=dict)
    timesteps: tuple[int, ...] = ()
    ticks: int = 1
    method: str = ""
    summary: dict[str, object] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        data = {name: value for name, value in self.__dict__.items() if name not in ("layers", "attentions")}
        data["layers"] = {name: layer_to_json(layer) for name, layer in self.layers.items()}
        data["attentions"] = {
            name: {part: layer_to_json(layer) for part, layer in parts.items()} for name, parts in self.attentions.items()
        }
        return json.dumps(data)

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        data = json.loads(text)
        data["layers"] = {name: layer_from_json(layer) for name, layer in data["layers"].items()}
        data["attentions"] = {
            name: {part: layer_from_json(layer) for part, layer in parts.items()} for name, parts in data["attentions"].items()
        }
        return cls(**data | {"timesteps": tuple(data["timesteps"])})


def layer_to_json(layer: LayerPlan) -> dict:
    return {"weight": format_to_json(layer.weight), "input": format_to_json(layer.input), "per_step": layer.per_step}


def layer_from_json(data: dict) -> LayerPlan:
    return LayerPlan(format_from_json(data["weight"]), format_from_json(data["input"]), data["per_step"])


def settings_to_json(settings: Settings) -> str:
    return json.dumps(asdict(settings), sort_keys=True)
