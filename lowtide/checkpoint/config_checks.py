"""What the configurations beside a packed model may say, before diffusers builds from them."""

import json
from pathlib import Path
from typing import Any

from lowtide.errors import BadInput

INDEX = "model_index.json"
SCHEDULER = "scheduler_config.json"
MOST = 2**20  # of a whole number, which is a size or a count
FARTHEST = 2.0**31  # of other numbers
# How names of sizes and counts end. Their values are numbers from 0 on, and lists of them.
SIZES = ("_size", "_channels", "_dim", "_heads", "_layers", "_per_block", "_groups", "_length")
MOST_TIMESTEPS = 10**6
NUMBERS = ("beta_start", "beta_end")
UNBOUNDED = ("lambda_min_clipped",)  # -Infinity is diffusers' own default
TEXTS = ("_class_name", "beta_schedule", "prediction_type", "timestep_spacing")


def read_json(path: Path) -> dict[str, Any]:
    """The fields of a configuration."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _wrong(path, f"that is no JSON ({type(error).__name__})") from error
    if not isinstance(fields, dict):
        raise _wrong(path, "without fields")
    return fields


def _wrong(path: Path, what: str) -> BadInput:
    return BadInput(
        f"found {path.name} in {path.parent} {what}",
        "the configuration that was saved",
        "copy or download the folder again",
    )


def shards_in(folder: Path) -> list[Path]:
    """The files of weights in a folder, in order of their names."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def check_config(path: Path, kind: type) -> None:
    """Sizes of a network are numbers that a machine can have; indexes name files beside them."""
    fields = read_json(path)
    _check_numbers(path, fields, "")
    for index in path.parent.glob("*.safetensors.index.json"):
        _check_shards(index)


def _check_numbers(path: Path, value: object, name: str) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            _check_numbers(path, each, str(key))
    elif isinstance(value, list):
        for each in value:
            _check_numbers(path, each, name)
    elif isinstance(value, int | float) and name not in UNBOUNDED:
        most = MOST if isinstance(value, int) else FARTHEST
        least = 0 if name.endswith(SIZES) else 1 - most
        if not least <= value < most:
            raise _wrong(path, f"where {name} is {value}")
    elif isinstance(value, str) and name.endswith(SIZES):
        raise _wrong(path, f"where {name} is {value!r}")


def _check_shards(index: Path) -> None:
    """An index names tensors, and files beside it."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise _wrong(index, "without a weight_map")
    beside = {path.name for path in shards_in(index.parent)}
    for tensor, name in places.items():
        if not isinstance(name, str) or name not in beside:
            raise _wrong(index, f"where tensor {tensor} is in {name!r}, which is no file beside it")


def check_index(folder: Path) -> None:
    """model_index.json names a class and its library for each part."""
    path = folder / INDEX
    if not path.is_file():
        return
    fields = read_json(path)
    if not isinstance(fields.get("_class_name"), str | list):
        raise _wrong(path, "without a _class_name")
    parts = {each.name for each in folder.iterdir() if each.is_dir()}
    for name, part in fields.items():
        if name.startswith("_") or name not in parts:
            continue
        if not isinstance(part, list) or len(part) != 2 or not _are_names(part):
            raise _wrong(path, f"where {name} is {str(part)[:40]}, not a library and a class")


def _are_names(part: list[Any]) -> bool:
    """Such as "diffusers" or "lowtide.sampling.quadratic_ddim", and a class."""
    return all(
        isinstance(each, str) and all(map(str.isidentifier, each.split("."))) for each in part
    )


def check_scheduler(folder: Path) -> None:
    """A scheduler's configuration has numbers and texts where schedulers read them."""
    path = folder / SCHEDULER
    fields = read_json(path)
    _check_numbers(path, fields, "")
    steps = fields.get("num_train_timesteps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 < steps <= MOST_TIMESTEPS:
        raise _wrong(path, f"where num_train_timesteps is {steps}")
    for name in NUMBERS:
        if name in fields and not _is_finite(fields[name]):
            raise _wrong(path, f"where {name} is {fields[name]}")
    for name in TEXTS:
        if name in fields and not isinstance(fields[name], str):
            raise _wrong(path, f"where {name} is {fields[name]}")
    betas = fields.get("trained_betas")
    if betas is not None and not (isinstance(betas, list) and all(map(_is_finite, betas))):
        raise _wrong(path, f"where trained_betas is {str(betas)[:40]}")


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -FARTHEST < value < FARTHEST
