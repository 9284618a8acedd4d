"""The evidence of a comparison: the types of evidence.json, and how it is written and read.

A measurement that was not made is absent from the file. A number that JSON cannot hold, NaN or
infinity, is null there and NaN here.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from lowtide.errors import BadInput

NAME = "evidence.json"
VERSION = 1
COLOURS = 6
AGAIN = "run `lowtide evaluate` again"


class Environment(Struct, frozen=True, kw_only=True):
    """Versions of the libraries, the processor, the number of threads, and the GPU."""

    python: str
    torch: str
    diffusers: str
    lowtide: str
    cpu: str
    threads: int
    gpu: str | None = None


class Sampling(Struct, frozen=True, kw_only=True):
    """The request that all models sampled."""

    seeds: Annotated[tuple[int, ...], Meta(min_length=1)]
    prompts: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    steps: int
    batch: int
    guidance: float | None = None
    eta: float | None = None
    scheduler: str


class Measurement(Struct, frozen=True, kw_only=True):
    """A metric's value, its 95 % interval (bootstrap over images), and what is needed to repeat it.

    A single image has no interval.
    """

    value: float = math.nan
    low: float | None = None
    high: float | None = None
    n: int
    higher_is_better: bool
    backend: str
    weights: str | None = None
    resize: str
    seeds: str

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class ErrorTable:
    """Errors by name and timestep; `error` has the shape (names, timesteps)."""

    names: Sequence[str]
    timesteps: Sequence[int]
    error: np.ndarray

    def average(self) -> np.ndarray:
        """The mean over the rows that are numbers, at each timestep: (timesteps,)"""
        known = np.isfinite(self.error)
        sums = np.where(known, self.error, 0).sum(0)
        return np.where(known.any(0), sums / np.maximum(known.sum(0), 1), np.nan)

    def largest(self) -> list[tuple[str, int, float]]:
        """The largest error of each row that has a number, with its timestep; the worst first."""
        errors = np.where(np.isfinite(self.error), self.error, -1)
        places = errors.argmax(1).tolist()
        rows = zip(self.names, places, errors.max(1).tolist(), strict=True)
        known = [(name, self.timesteps[place], error) for name, place, error in rows if error >= 0]
        return sorted(known, key=lambda row: -row[2])


def _checked_table(
    names: Sequence[str], timesteps: Sequence[int], rows: Sequence[Sequence[float]]
) -> ErrorTable:
    """The errors as an array, (names, timesteps)."""
    lengths = sorted({len(row) for row in rows}) or [len(timesteps)]
    if lengths != [len(timesteps)] or len(rows) != len(names):
        columns = " or ".join(map(str, lengths))
        expected = f"{len(names)} x {len(timesteps)}"
        raise ValueError(f"found {len(rows)} x {columns} errors, expected {expected}")
    return ErrorTable(names, timesteps, np.array(rows, float).reshape(len(rows), len(timesteps)))


class TrajectoryErrors(Struct, frozen=True):
    """The relative L2 error of the sample after each step."""

    timesteps: list[int]
    error: list[float]

    def __post_init__(self) -> None:
        self.table()

    def table(self) -> ErrorTable:
        """(1, timesteps)"""
        return _checked_table([""], self.timesteps, [self.error])


class LayerErrors(Struct, frozen=True):
    """Relative L2 errors of layer outputs; error: layers x timesteps."""

    names: list[str]
    units: list[str]
    timesteps: list[int]
    error: list[list[float]]

    def __post_init__(self) -> None:
        self.table()

    def table(self) -> ErrorTable:
        return _checked_table(self.names, self.timesteps, self.error)


class TemporalErrors(Struct, frozen=True):
    """Squared errors of temporal features; error: features x timesteps."""

    features: list[str]
    timesteps: list[int]
    error: list[list[float]]

    def __post_init__(self) -> None:
        self.table()

    def table(self) -> ErrorTable:
        return _checked_table(self.features, self.timesteps, self.error)


class LayerBits(Struct, frozen=True, kw_only=True):
    """One layer: bits per weight (the average where channels differ), bits per input, size."""

    name: str
    unit: str
    weights: float
    inputs: float
    parameters: int
    kernel: str | None = None


class GateResult(Struct, frozen=True, kw_only=True):
    """One gate of one model; a value that is no number fails."""

    name: str
    model: str
    limit: float
    value: float = math.nan
    passed: bool


def _empty() -> dict[str, Any]:
    """msgspec omits a field that is equal to its default, unless a function makes the default."""
    return {}


class Model(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model and its measurements; what is None is not in the file.

    From `weights` to `real`: what only lowtide's own checkpoints tell. `left`: the layers in float,
    each with a reason. `stages`: seconds. `predicted` and `real`: bytes, peak_bytes and minutes.
    From `trajectory` to `temporal`: the drift from the reference, which itself has none. `temporal`
    is None if temporal features depend on more than the timestep.
    """

    name: str
    source: str
    kind: str
    bytes: Annotated[int, Meta(gt=0)]
    seconds_per_step: Annotated[float, Meta(gt=0)]
    weights: int | None = None
    inputs: int | None = None
    profile: str | None = None
    method: str | None = None
    bits: list[LayerBits] | None = None
    left: dict[str, str] | None = None
    stages: dict[str, float] | None = None
    float_share: float | None = None
    predicted: dict[str, float] | None = None
    real: dict[str, float] | None = None
    trajectory: TrajectoryErrors | None = None
    layers: LayerErrors | None = None
    temporal: TemporalErrors | UnsetType | None = UNSET
    metrics: dict[str, Measurement] = msgspec.field(default_factory=_empty)
    per_image: dict[str, list[float]] = msgspec.field(default_factory=_empty)

    @property
    def psnr(self) -> float:
        """PSNR to the reference; NaN if it was not measured or is no number."""
        return self.metrics["psnr"].value if "psnr" in self.metrics else math.nan


class Evidence(Struct, frozen=True, kw_only=True):
    """A whole comparison: models by key, in the order of the command; `reference` is a key.

    run: a hash of models, settings and code; None for models without a name.
    """

    version: int = VERSION
    title: str
    command: str
    date: str
    environment: Environment
    request: Sampling
    captions: list[str] | None = None
    reference: str
    models: dict[str, Model]
    gates: list[GateResult] = []
    run: str | None = None

    def __post_init__(self) -> None:
        keys = ", ".join(self.models) or "(there are none)"
        for name in (self.reference, *(gate.model for gate in self.gates)):
            if name not in self.models:
                raise ValueError(f"found model {name!r}, expected one of {keys}")
        per_image = chain.from_iterable(model.per_image.items() for model in self.models.values())
        for name, values in [("captions", self.captions or self.request.seeds), *per_image]:
            if len(values) != len(self.request.seeds):
                expected = f"one for each of the {len(self.request.seeds)} seeds"
                raise ValueError(f"found {len(values)} values of {name}, expected {expected}")

    @property
    def base(self) -> Model:
        """The reference."""
        return self.models[self.reference]

    @property
    def others(self) -> dict[str, Model]:
        """All models but the reference."""
        return {key: model for key, model in self.models.items() if key != self.reference}

    @property
    def lead(self) -> str | None:
        """The model of the headline: the highest PSNR among lowtide's own models, or among all."""
        own = {key: model for key, model in self.others.items() if model.kind == "lowtide"}
        psnr = {key: model.psnr for key, model in (own or self.others).items()}
        return max(psnr, key=lambda key: np.nan_to_num(psnr[key], nan=-math.inf), default=None)

    def colour(self, key: str) -> int:
        """The number of the model's colour; the reference has 0."""
        return 0 if key == self.reference else 1 + list(self.others).index(key) % COLOURS

    def caption(self, seed: int) -> str:
        caption = self.captions[self.request.seeds.index(seed)] if self.captions else ""
        return caption or f"seed {seed}"


def as_json(evidence: Evidence) -> dict[str, Any]:
    """The contents of evidence.json as plain JSON, without NaN and infinity."""
    return msgspec.json.decode(msgspec.json.encode(evidence))


def write(evidence: Evidence, folder: Path) -> None:
    """FOLDER/evidence.json"""
    text = json.dumps(as_json(evidence), allow_nan=False) + "\n"
    (folder / NAME).write_text(text, encoding="utf-8")


def read(folder: Path) -> Evidence:
    """The evidence in a folder; a mistake in it is an error of one sentence."""
    tree = _parsed(folder)
    version = tree.get("version") if isinstance(tree, Mapping) else VERSION
    if version != VERSION:
        way_out = f"use the lowtide that wrote it, or {AGAIN}"
        raise BadInput(f"found evidence of version {version}", f"version {VERSION}", way_out)
    try:
        return msgspec.convert(_without_null(tree), Evidence)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "'")
        wrong = f"found {NAME} with a mistake ({reason})"
        raise BadInput(wrong, "what `lowtide evaluate` writes", AGAIN) from error


def _parsed(folder: Path) -> object:
    path = folder / NAME
    if not path.is_file():
        empty = folder.is_dir() and not any(folder.iterdir())
        lack = "an empty folder" if empty else f"no {NAME} in"
        lack = lack if folder.is_dir() else "no folder"
        expected = "a folder that `lowtide evaluate` wrote"
        raise BadInput(f"found {lack} {folder}", expected, f"check the path, or {AGAIN}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"found {path} that does not parse ({error})", "JSON", AGAIN) from error


def _without_null(tree: object) -> object:
    """An entry of an object that is null becomes absent, and a null in a list becomes NaN."""
    if isinstance(tree, Mapping):
        entries = tree.items()
        return {name: _without_null(value) for name, value in entries if value is not None}
    if isinstance(tree, list):
        return [math.nan if value is None else _without_null(value) for value in tree]
    return tree
