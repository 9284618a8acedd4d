"""The evidence of an evaluation as frozen records, read from evidence.json and checked on the way in."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.errors import BadInput

VERSION = 1
COLOURS = 6
AGAIN = "run `lowtide evaluate` again"


@dataclass(frozen=True)
class Measure:
    """One metric of one model. `about`: what else was recorded, such as the backend and the hash of its weights."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool
    about: Mapping[str, Any]


@dataclass(frozen=True)
class Drift:
    """Errors by name (rows) and timestep (columns)."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    timesteps: tuple[int, ...]
    error: np.ndarray


@dataclass(frozen=True)
class Bits:
    """One layer: bits per weight and per input, and how many parameters it has."""

    name: str
    unit: str
    weights: float
    inputs: float | None
    parameters: int
    kernel: str | None


@dataclass(frozen=True)
class Model:
    """One model and what was seen of it; what was not measured is None or empty."""

    key: str
    name: str
    kind: str
    source: str
    settings: Mapping[str, Any]
    bytes: float
    seconds_per_step: float
    metrics: Mapping[str, Measure]
    peak_bytes: float | None = None
    float_share: float | None = None
    trajectory: Drift | None = None
    layers: Drift | None = None
    temporal: Drift | None = None
    bits: tuple[Bits, ...] = ()
    per_image: Mapping[str, Sequence[float]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    real: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Gate:
    """A bound that a model had to keep."""

    name: str
    model: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Evidence:
    """All of it: what was asked, where it ran, and the models in the order they were named."""

    folder: Path
    title: str
    command: str
    date: str
    environment: Mapping[str, Any]
    request: Mapping[str, Any]
    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    reference: Model
    models: tuple[Model, ...]
    gates: tuple[Gate, ...]

    @property
    def others(self) -> tuple[Model, ...]:
        return tuple(model for model in self.models if model is not self.reference)

    @property
    def lead(self) -> Model | None:
        """The model the page speaks of first: of lowtide's own, or of all others, the one most like the original."""
        own = [model for model in self.others if model.kind == "lowtide"] or list(self.others)
        return max(own, key=lambda model: model.metrics["psnr"].value if "psnr" in model.metrics else -math.inf, default=None)

    def number(self, model: Model) -> int:
        """Which colour it has, by its place among the others; the reference has 0."""
        return 0 if model is self.reference else 1 + self.others.index(model) % COLOURS

    def named(self, key: str) -> Model:
        return next(model for model in self.models if model.key == key)

    def image(self, model: Model, seed: int) -> Path:
        return self.folder / "images" / model.key / f"{seed}.png"


class Record:
    """A JSON object that knows where it stands, so that what is wrong in it can be named."""

    def __init__(self, data: Any, where: str):
        if not isinstance(data, dict):
            raise BadInput(f"found {type(data).__name__} as {where}", "an object", AGAIN)
        self.data, self.where = data, where

    def get(self, key: str, kinds: Any, expected: str, default: Any = None) -> Any:
        """The value; a missing one, or null, is the default, and an error if there is none."""
        value = self.data.get(key)
        if value is None:
            if default is None:
                raise BadInput(f"found no {key!r} in {self.where}", expected, AGAIN)
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise BadInput(f"found {value!r:.40} as {key!r} in {self.where}", expected, AGAIN)
        return value

    def number(self, key: str) -> float:
        return self.get(key, int | float, "a number")

    def positive(self, key: str) -> float:
        value = self.number(key)
        if not 0 < value < math.inf:
            raise BadInput(f"found {value!r} as {key!r} in {self.where}", "a number above 0", AGAIN)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self.get(key, str, "a text", default)

    def many(self, key: str, default: list | None = None) -> list:
        return self.get(key, list, "a list", default)

    def record(self, key: str, default: dict | None = None) -> "Record":
        return Record(self.get(key, dict, "an object", default), f"{key} of {self.where}")

    def records(self, key: str) -> "list[Record]":
        return [Record(each, f"{key}[{place}] of {self.where}") for place, each in enumerate(self.many(key, []))]

    def numbers(self, key: str) -> dict[str, float]:
        """An optional object of numbers; what is null in it was not measured."""
        inner = self.record(key, {})
        return {name: inner.number(name) for name, value in inner.data.items() if value is not None}

    def maybe(self, key: str) -> float | None:
        return None if self.data.get(key) is None else self.number(key)


def read(folder: Path) -> Evidence:
    """The evidence in a folder; a folder without any, or with some that cannot be drawn, is one sentence."""
    record = Record(parsed(folder), "evidence.json")
    version = record.get("version", int, f"version {VERSION}")
    if version != VERSION:
        raise BadInput(f"found evidence of version {version}", f"version {VERSION}", "use the lowtide that wrote it, or " + AGAIN)
    models = tuple(model(key, record.record("models")) for key in record.record("models").data)
    keys = {each.key: each for each in models}
    reference = record.text("reference")
    if reference not in keys:
        raise BadInput(f"found reference {reference!r}", f"one of the models {', '.join(keys) or '(there are none)'}", AGAIN)
    request = record.record("request")
    seeds = tuple(request.many("seeds"))
    if not seeds:
        raise BadInput("found no seeds in evidence.json", "at least one", AGAIN)
    return Evidence(
        folder=folder,
        title=record.text("title"),
        command=record.text("command"),
        date=record.text("date"),
        environment=record.record("environment").data,
        request=request.data,
        seeds=seeds,
        captions=captions(record, len(seeds)),
        reference=keys[reference],
        models=models,
        gates=tuple(gate(each, keys) for each in record.records("gates")),
    )


def nothing_in(folder: Path) -> str:
    if not folder.is_dir():
        return "no folder"
    return "no evidence.json in" if any(folder.iterdir()) else "an empty folder"


def parsed(folder: Path) -> Any:
    path = folder / "evidence.json"
    if not path.is_file():
        raise BadInput(
            f"found {nothing_in(folder)} {folder}", "a folder that `lowtide evaluate` wrote", "check the path, or " + AGAIN
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise BadInput(f"found {path} that does not parse ({wrong})", "JSON", AGAIN) from wrong


def captions(record: Record, count: int) -> tuple[str, ...]:
    found = tuple(map(str, record.many("captions", [])))
    if found and len(found) != count:
        raise BadInput(f"found {len(found)} captions", f"one for each of the {count} seeds", AGAIN)
    return found


def model(key: str, models: Record) -> Model:
    record = models.record(key)
    metrics = record.record("metrics", {})
    return Model(
        key=key,
        name=record.text("name"),
        kind=record.text("kind"),
        source=record.text("source", ""),
        settings={name: record.data.get(name) for name in ("method", "weights", "inputs", "profile")},
        bytes=record.positive("bytes"),
        seconds_per_step=record.positive("seconds_per_step"),
        metrics={name: measure(metrics.record(name)) for name, value in metrics.data.items() if value is not None},
        peak_bytes=record.maybe("peak_bytes"),
        float_share=record.maybe("float_share"),
        trajectory=drift(record, "trajectory", None),
        layers=drift(record, "layers", "names"),
        temporal=drift(record, "temporal", "features"),
        bits=tuple(bits(each) for each in record.records("bits")),
        per_image=record.record("per_image", {}).data,
        left=record.record("left", {}).data,
        stages=record.numbers("stages"),
        predicted=record.numbers("predicted"),
        real=record.numbers("real"),
    )


def measure(record: Record) -> Measure:
    told = {"value", "low", "high", "n", "higher_is_better"}
    about = {name: value for name, value in record.data.items() if name not in told and value is not None}
    better = record.get("higher_is_better", bool, "true or false")
    n = record.maybe("n")
    return Measure(
        record.number("value"), record.maybe("low"), record.maybe("high"), None if n is None else int(n), better, about
    )


def drift(record: Record, key: str, rows: str | None) -> Drift | None:
    """An optional table of errors; a trajectory has one row and no names."""
    if not record.data.get(key):
        return None
    inner = record.record(key)
    names = tuple(map(str, inner.many(rows))) if rows else ("",)
    units = tuple(map(str, inner.many("units", []))) or names
    timesteps = tuple(inner.many("timesteps"))
    error = inner.many("error") if rows else [inner.many("error")]
    shape = (len(names), len(timesteps))
    table = rectangle(error, lambda: f"{key} of {record.where}")
    if table.shape != shape or len(units) != len(names):
        found = " x ".join(map(str, table.shape))
        raise BadInput(f"found {found} errors in {key} of {record.where}", f"{shape[0]} x {shape[1]}", AGAIN)
    return Drift(names, units, timesteps, table) if all(shape) else None


def rectangle(rows: list, where: Callable[[], str]) -> np.ndarray:
    try:
        return np.array(rows, dtype=float)
    except (TypeError, ValueError) as wrong:
        raise BadInput(f"found ragged or missing errors in {where()}", "a table of numbers", AGAIN) from wrong


def bits(record: Record) -> Bits:
    return Bits(
        name=record.text("name"),
        unit=record.text("unit", record.text("name")),
        weights=record.number("weights"),
        inputs=record.maybe("inputs"),
        parameters=int(record.number("parameters")),
        kernel=record.text("kernel", "") or None,
    )


def gate(record: Record, models: Mapping[str, Model]) -> Gate:
    key = record.text("model")
    if key not in models:
        raise BadInput(f"found model {key!r} in {record.where}", f"one of {', '.join(models)}", AGAIN)
    passed = record.get("passed", bool, "true or false")
    return Gate(record.text("name"), key, record.number("limit"), record.number("value"), passed)
