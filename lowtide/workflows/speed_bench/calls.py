"""The calls of a denoiser in a file: arrays by the number of the call and the argument's name.

An argument that is a dictionary has a name for each of its parts, with a slash between. Arguments
that are no arrays, such as return_dict, stand in "settings" as JSON. None is left out.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETTINGS = "settings"
Arrays = dict[str, Any]


def write(path: Path, calls: Sequence[Mapping[str, Any]]) -> None:
    """Write the arguments of each call; arrays, dictionaries of arrays, and plain values."""
    arrays: dict[str, Any] = {}
    settings: list[dict[str, Any]] = []
    for number, call in enumerate(calls):
        flat = flattened(call)
        arrays |= {f"{number}/{name}": each for name, each in flat.items() if is_array(each)}
        plain = {name: each for name, each in flat.items() if not is_array(each)}
        settings.append({name: each for name, each in plain.items() if each is not None})
    arrays[SETTINGS] = np.array(json.dumps(settings))
    np.savez(path, **arrays)


def read(path: Path) -> list[Arrays]:
    """The calls, flat: arrays and plain values by name."""
    with np.load(path) as file:
        calls: list[Arrays] = json.loads(str(file[SETTINGS]))
        for key in file.files:
            if key != SETTINGS:
                number, _, name = key.partition("/")
                calls[int(number)][name] = file[key]
    return calls


def flattened(values: Mapping[str, Any], prefix: str = "") -> Arrays:
    flat: Arrays = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{name}/")
        else:
            flat[prefix + name] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as the denoiser takes them."""
    values: dict[str, Any] = {}
    for name, value in flat.items():
        *owners, last = name.split("/")
        place = values
        for owner in owners:
            place = place.setdefault(owner, {})
        place[last] = value
    return values


def is_array(value: object) -> bool:
    return isinstance(value, np.ndarray)
