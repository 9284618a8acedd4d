"""The evidence of an evaluation as typed dataclasses, read from evidence.json and checked."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TypeVar

import numpy as np

from lowtide.errors import BadInput

VERSION = 1
COLOURS = 6
AGAIN = "run `lowtide evaluate` again"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Measure:
    """One metric of one model. `about`: how it was measured, such as the backend."""

    value: float
    low: float | None
    high: float | None
    n: int | None
    higher_is_better: bool
    about: Mapping[str, object]


@dataclass(frozen=True)
class ErrorTable:
    """Errors by name and timestep; `error` has the shape (names, timesteps)."""

    names: tuple[str, ...]
    timesteps: tuple[int, ...]
    error: np.ndarray


@dataclass(frozen=True)
class LayerBits:
    """One layer: bits per weight and per input, and the number of its parameters."""

    name: str
    unit: str
    weights: float
    inputs: float | None
    parameters: int
    kernel: str | None


@dataclass(frozen=True)
class Model:
    """One model and its measurements; what was not measured is None or empty."""

    key: str
    name: str
    kind: str
    method: str | None
    profile: str | None
    bytes: float
    seconds_per_step: float
    metrics: Mapping[str, Measure]
    float_share: float | None = None
    trajectory: ErrorTable | None = None
    layers: ErrorTable | None = None
    temporal: ErrorTable | None = None
    bits: tuple[LayerBits, ...] = ()
    per_image: Mapping[str, Sequence[float | None]] = field(default_factory=dict)
    left: Mapping[str, str] = field(default_factory=dict)
    stages: Mapping[str, float] = field(default_factory=dict)
    predicted: Mapping[str, float] = field(default_factory=dict)
    real: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bound:
    """A gate of the comparison: a limit on one metric of one model."""

    name: str
    model: str
    limit: float
    value: float
    passed: bool


@dataclass(frozen=True)
class Evidence:
    """A whole comparison; the models are in the order of the command."""

    folder: Path
    title: str
    command: str
    date: str
    environment: Mapping[str, object]
    request: Mapping[str, object]
    seeds: tuple[int, ...]
    captions: tuple[str, ...]
    reference: Model
    models: tuple[Model, ...]
    gates: tuple[Bound, ...]

    @property
    def others(self) -> tuple[Model, ...]:
        """All models but the reference."""
        return tuple(model for model in self.models if model is not self.reference)

    @property
    def lead(self) -> Model | None:
        """The model of the headline: the highest PSNR among lowtide's own models, or among all."""
        own = [model for model in self.others if model.kind == "lowtide"] or self.others
        psnr = {each.key: each.metrics["psnr"].value for each in own if "psnr" in each.metrics}
        psnr = {key: value for key, value in psnr.items() if not math.isnan(value)}
        return max(own, key=lambda each: psnr.get(each.key, -math.inf), default=None)

    def colour(self, model: Model) -> int:
        """The number of the model's colour; the reference has 0."""
        return 0 if model is self.reference else 1 + self.others.index(model) % COLOURS

    def caption(self, seed: int) -> str:
        caption = self.captions[self.seeds.index(seed)] if self.captions else ""
        return caption or f"seed {seed}"

    def image(self, model: Model, seed: int) -> Path:
        return self.folder / "images" / model.key / f"{seed}.png"


class _Reader:
    """A JSON object and its path, so that an error names the wrong entry."""

    def __init__(self, data: object, path: str):
        if not isinstance(data, dict):
            raise BadInput(f"found {type(data).__name__} as {path}", "an object", AGAIN)
        self.data: dict[str, object] = data
        self.path = path

    def get(
        self, key: str, kind: type[Value], expected: str, default: Value | None = None
    ) -> Value:
        """The value. A missing one, or null, is the default, and an error without a default."""
        value = self.data.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise BadInput(f"found no {key!r} in {self.path}", expected, AGAIN)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise BadInput(f"found {value!r:.40} as {key!r} in {self.path}", expected, AGAIN)
        return value

    def number(self, key: str) -> float:
        return float(self.get(key, Real, "a number"))

    def optional_number(self, key: str) -> float | None:
        return None if self.data.get(key) is None else self.number(key)

    def number_or_nan(self, key: str) -> float:
        """A number that JSON cannot hold, such as the PSNR of equal images, is null there."""
        return math.nan if key in self.data and self.data[key] is None else self.number(key)

    def positive(self, key: str) -> float:
        value = self.number(key)
        if not 0 < value < math.inf:
            wrong = f"found {self.data[key]!r} as {key!r} in {self.path}"
            raise BadInput(wrong, "a number above 0", AGAIN)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        return self.get(key, str, "a text", default)

    def many(self, key: str, default: list | None = None) -> list:
        return self.get(key, list, "a list", default)

    def object(self, key: str, default: dict | None = None) -> "_Reader":
        return _Reader(self.get(key, dict, "an object", default), f"{key} of {self.path}")

    def objects(self, key: str) -> "list[_Reader]":
        entries = enumerate(self.many(key, []))
        return [_Reader(entry, f"{key}[{place}] of {self.path}") for place, entry in entries]

    def numbers(self, key: str) -> dict[str, float]:
        """An optional object of numbers; null means that a value was not measured."""
        inner = self.object(key, {})
        return {name: inner.number(name) for name in inner.data if inner.data[name] is not None}


def read(folder: Path) -> Evidence:
    """The evidence in a folder; evidence that cannot be drawn is an error of one sentence."""
    reader = _Reader(_parsed(folder), "evidence.json")
    version = reader.get("version", int, f"version {VERSION}")
    if version != VERSION:
        way_out = "use the lowtide that wrote it, or " + AGAIN
        raise BadInput(f"found evidence of version {version}", f"version {VERSION}", way_out)
    entries = reader.object("models")
    models = {key: _model(key, entries.object(key)) for key in entries.data}
    reference = reader.text("reference")
    if reference not in models:
        expected = f"one of the models {', '.join(models) or '(there are none)'}"
        raise BadInput(f"found reference {reference!r}", expected, AGAIN)
    request = reader.object("request")
    seeds = tuple(request.many("seeds"))
    if not seeds:
        raise BadInput("found no seeds in evidence.json", "at least one", AGAIN)
    return Evidence(
        folder=folder,
        title=reader.text("title"),
        command=reader.text("command"),
        date=reader.text("date"),
        environment=reader.object("environment").data,
        request=request.data,
        seeds=seeds,
        captions=_captions(reader, len(seeds)),
        reference=models[reference],
        models=tuple(models.values()),
        gates=tuple(_gate(entry, models) for entry in reader.objects("gates")),
    )


def _parsed(folder: Path) -> object:
    path = folder / "evidence.json"
    if not path.is_file():
        empty = folder.is_dir() and not any(folder.iterdir())
        lack = "an empty folder" if empty else "no evidence.json in"
        lack = lack if folder.is_dir() else "no folder"
        expected = "a folder that `lowtide evaluate` wrote"
        raise BadInput(f"found {lack} {folder}", expected, "check the path, or " + AGAIN)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as wrong:
        raise BadInput(f"found {path} that does not parse ({wrong})", "JSON", AGAIN) from wrong


def _captions(reader: _Reader, count: int) -> tuple[str, ...]:
    captions = tuple(map(str, reader.many("captions", [])))
    if captions and len(captions) != count:
        expected = f"one for each of the {count} seeds"
        raise BadInput(f"found {len(captions)} captions", expected, AGAIN)
    return captions


def _model(key: str, reader: _Reader) -> Model:
    metrics = reader.object("metrics", {})
    measured = [name for name, value in metrics.data.items() if value is not None]
    per_image = reader.object("per_image", {})
    left = reader.object("left", {})
    return Model(
        key=key,
        name=reader.text("name"),
        kind=reader.text("kind"),
        method=reader.text("method", "") or None,
        profile=reader.text("profile", "") or None,
        bytes=reader.positive("bytes"),
        seconds_per_step=reader.positive("seconds_per_step"),
        metrics={name: _measure(metrics.object(name)) for name in measured},
        float_share=reader.optional_number("float_share"),
        trajectory=_errors(reader, "trajectory", None),
        layers=_errors(reader, "layers", "names"),
        temporal=_errors(reader, "temporal", "features"),
        bits=tuple(_layer_bits(entry) for entry in reader.objects("bits")),
        per_image={name: per_image.many(name) for name in per_image.data},
        left={name: left.text(name) for name in left.data},
        stages=reader.numbers("stages"),
        predicted=reader.numbers("predicted"),
        real=reader.numbers("real"),
    )


def _measure(reader: _Reader) -> Measure:
    fields = {"value", "low", "high", "n", "higher_is_better"}
    about = {name: value for name, value in reader.data.items() if name not in fields}
    n = reader.optional_number("n")
    return Measure(
        value=reader.number_or_nan("value"),
        low=reader.optional_number("low"),
        high=reader.optional_number("high"),
        n=None if n is None else int(n),
        higher_is_better=reader.get("higher_is_better", bool, "true or false"),
        about={name: value for name, value in about.items() if value is not None},
    )


def _errors(reader: _Reader, key: str, rows: str | None) -> ErrorTable | None:
    """An optional table of errors; a trajectory has one row and no names."""
    if not reader.data.get(key):
        return None
    inner = reader.object(key)
    names = tuple(map(str, inner.many(rows))) if rows else ("",)
    timesteps = tuple(inner.many("timesteps"))
    error = inner.many("error") if rows else [inner.many("error")]
    try:
        table = np.array(error, dtype=float)
    except (TypeError, ValueError) as wrong:
        message = f"found ragged or missing errors in {inner.path}"
        raise BadInput(message, "a table of numbers", AGAIN) from wrong
    shape = (len(names), len(timesteps))
    if table.shape != shape:
        message = f"found {' x '.join(map(str, table.shape))} errors in {inner.path}"
        raise BadInput(message, f"{shape[0]} x {shape[1]}", AGAIN)
    return ErrorTable(names, timesteps, table) if all(shape) else None


def _layer_bits(reader: _Reader) -> LayerBits:
    return LayerBits(
        name=reader.text("name"),
        unit=reader.text("unit", reader.text("name")),
        weights=reader.number("weights"),
        inputs=reader.optional_number("inputs"),
        parameters=int(reader.number("parameters")),
        kernel=reader.text("kernel", "") or None,
    )


def _gate(reader: _Reader, models: Mapping[str, Model]) -> Bound:
    key = reader.text("model")
    if key not in models:
        raise BadInput(
            f"found model {key!r} in {reader.path}", f"one of {', '.join(models)}", AGAIN
        )
    return Bound(
        name=reader.text("name"),
        model=key,
        limit=reader.number("limit"),
        value=reader.number_or_nan("value"),
        passed=reader.get("passed", bool, "true or false"),
    )


def finite(tree: object) -> object:
    """The tree as plain JSON, which has no NaN and no infinity: such a number becomes null."""
    if isinstance(tree, Mapping):
        return {name: finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
