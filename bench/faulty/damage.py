"""Damage of a saved folder that no hash was told of: flips, cuts, swaps, edits of its JSON."""

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUGE = (2**60, 10**9, -(2**40), 10**30)
# Values that no field holds.
NONSENSE: tuple[Any, ...] = (*HUGE, -1, 0, None, "nonsense", [], {}, 1e308, [2**60], True)


@dataclass(frozen=True)
class Fault:
    """What was done to a folder. An error has to hold one of the words."""

    kind: str
    what: str
    words: tuple[str, ...]


class NothingToDo(Exception):
    """The fault that was drawn does not fit the folder."""


def files_of(folder: Path) -> list[Path]:
    """The files that loading reads; the card, and the record of the run, are not among them."""
    left_out = ("README.md", "lowtide.json")
    return sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name not in left_out
    )


def a_file(folder: Path, rng: random.Random) -> Path:
    """Half of the faults hit weights."""
    files = files_of(folder)
    weights = [path for path in files if path.suffix == ".safetensors"]
    return rng.choice(weights if rng.random() < 0.5 else files)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file, and the bytes after it."""
    data = path.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def write_file(path: Path, header: dict[str, Any], rest: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def fault(kind: str, what: str, path: Path, *words: str) -> Fault:
    return Fault(kind, f"{path.parent.name}/{path.name}: {what}", (path.name, *words))


def tensor_words(path: Path) -> tuple[str, ...]:
    """What an error may name instead of a file of weights."""
    if path.suffix != ".safetensors":
        return ()
    return (*read_file(path)[0], "plan", "config.json", path.parent.name)


def flip(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = a_file(folder, rng)
    words = tensor_words(path)
    data = bytearray(path.read_bytes())
    place = rng.randrange(min(len(data), 4096) if rng.random() < 0.3 else len(data))
    data[place] ^= 1 << rng.randrange(8)
    path.write_bytes(data)
    return fault("flip", f"a bit of byte {place} of {len(data)}", path, *words)


def cut(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = a_file(folder, rng)
    words = tensor_words(path)
    data = path.read_bytes()
    keep = rng.choice([0, 1, 7, 8, 9, len(data) - 1, rng.randrange(len(data))])
    path.write_bytes(data[:keep])
    return fault("truncation", f"{keep} of {len(data)} bytes", path, *words)


def grow(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = a_file(folder, rng)
    words = tensor_words(path)
    more = rng.randbytes(rng.choice([1, 8, 4096]))
    path.write_bytes(path.read_bytes() + more)
    return fault("appended", f"{len(more)} bytes", path, *words)


def blank(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """A run of zeros, as a file system that lost a block leaves them."""
    path = a_file(folder, rng)
    words = tensor_words(path)
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    end = min(len(data), start + rng.choice([16, 512, 4096]))
    if not any(data[start:end]):
        raise NothingToDo
    data[start:end] = bytes(end - start)
    path.write_bytes(data)
    return fault("zeros", f"bytes {start} to {end}", path, *words)


def remove(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = a_file(folder, rng)
    words = tensor_words(path)
    path.unlink()
    if rng.random() < 0.2:
        path.mkdir()
        return fault("missing", "a folder in its place", path, *words)
    return fault("missing", "removed", path, *words)


def swap(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """A file of another checkpoint, or of another place in this one."""
    path = a_file(folder, rng)
    words = tensor_words(path)
    relative = path.relative_to(folder)
    there = [other / relative for other in others if (other / relative).is_file()]
    here = [each for each in files_of(folder) if each.suffix == path.suffix and each != path]
    source = rng.choice([*there, *here]) if there or here else None
    if source is None or source.read_bytes() == path.read_bytes():
        raise NothingToDo
    shutil.copyfile(source, path)
    return fault("swap", f"the content of {source.parent.name}/{source.name}", path, *words)


def header(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """An edit of one tensor's entry in the header."""
    path = rng.choice([each for each in files_of(folder) if each.suffix == ".safetensors"])
    words = tensor_words(path)
    entries, rest = read_file(path)
    name = rng.choice([each for each in entries if each != "__metadata__"])
    what = rng.choice(sorted(HEADER_EDITS))
    HEADER_EDITS[what](entries, name, rng)
    write_file(path, entries, rest)
    return fault("header", f"{what} of {name}", path, *words)


def _other_type(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    types = ("F32", "I32", "U8", "I8", "F16", "BF16", "F64", "BOOL", "X9")
    entries[name]["dtype"] = rng.choice([each for each in types if each != entries[name]["dtype"]])


def _other_shape(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    shape = entries[name]["shape"]
    choices = [[*shape, 1], [1, *shape], shape[::-1], [2**60, *shape], [-1], [10**9], "nonsense"]
    entries[name]["shape"] = rng.choice([each for each in choices if each != shape])


def _other_offsets(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    start, end = entries[name]["data_offsets"]
    choices = [[start + 4, end], [end, start], [0, 2**60], [-8, end], [start, end + 8], [], None]
    entries[name]["data_offsets"] = rng.choice(choices)


def _renamed(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    entries[f"{name}.other"] = entries.pop(name)


def _dropped(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    del entries[name]


def _exchanged(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    others = [each for each in entries if each not in ("__metadata__", name)]
    alike = [each for each in others if entries[each]["shape"] == entries[name]["shape"]]
    other = rng.choice(alike or others)
    entries[name], entries[other] = entries[other], entries[name]


def _without_metadata(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    entries.pop("__metadata__", None)


def _without_entry(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    kept = entries.get("__metadata__", {})
    kept.pop(rng.choice(sorted(kept)), None) if kept else None


def _other_metadata(entries: dict[str, Any], name: str, rng: random.Random) -> None:
    kept = entries.setdefault("__metadata__", {})
    key = rng.choice(sorted(kept) or ["format"])
    text = kept.get(key, "")
    place = rng.randrange(max(1, len(text)))
    choices = [text[:place], text[:place] + "9" + text[place + 1 :], "", "{}", "10" * 12, text * 2]
    kept[key] = rng.choice(choices)


HEADER_EDITS: dict[str, Callable[[dict[str, Any], str, random.Random], None]] = {
    "type": _other_type,
    "shape": _other_shape,
    "offsets": _other_offsets,
    "name": _renamed,
    "absence": _dropped,
    "exchange": _exchanged,
    "metadata without": _without_metadata,
    "metadata lacks": _without_entry,
    "metadata": _other_metadata,
}


def header_length(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = rng.choice([each for each in files_of(folder) if each.suffix == ".safetensors"])
    words = tensor_words(path)
    data = path.read_bytes()
    length = rng.choice([0, 1, 2**63, 2**60, 10**9, len(data), len(data) - 8, 2**64 - 1])
    path.write_bytes(struct.pack("<Q", length) + data[8:])
    return fault("header length", str(length), path, *words)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    found: list[tuple[Any, Any]] = [(value, key) for key in keys]
    for key in keys:
        if isinstance(value[key], dict | list):
            found += places_in(value[key])
    return found


def edit_json(value: Any, rng: random.Random) -> tuple[str, tuple[str, ...]]:
    """Change, remove or add one field of a JSON value in place; what was done, and its name."""
    container, key = rng.choice(places_in(value))
    before = container[key]
    if rng.random() < 0.15:
        del container[key]
        return f"{key} removed", (str(key),)
    if isinstance(before, bool):
        container[key] = not before
    elif isinstance(before, int | float) and rng.random() < 0.6:
        container[key] = rng.choice([before + 1, before * 2, -before - 1, before + 0.5])
    else:
        container[key] = rng.choice([each for each in NONSENSE if each != before])
    return f"{key} was {str(before)[:20]}, is {str(container[key])[:20]}", (str(key),)


def json_field(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = rng.choice([each for each in files_of(folder) if each.suffix == ".json"])
    value = json.loads(path.read_text())
    what, words = edit_json(value, rng)
    path.write_text(json.dumps(value))
    return fault("json field", what, path, *words)


def json_whole(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    path = rng.choice([each for each in files_of(folder) if each.suffix == ".json"])
    texts = ("", "{", "[]", "{}", "null", "5", '"x"', '{"a":NaN}', "\ufeff{}", "[" * 100_000, "\0")
    text = rng.choice(texts)
    path.write_text(text)
    return fault("json whole", repr(text[:12]), path)


def plan(folder: Path, rng: random.Random, others: list[Path]) -> Fault:
    """An edit of the plan, whose hash stays that of the old one."""
    path = rng.choice(sealed(folder))
    entries, rest = read_file(path)
    value = json.loads(entries["__metadata__"]["lowtide_plan"])
    what, words = edit_json(value, rng)
    entries["__metadata__"]["lowtide_plan"] = json.dumps(value, separators=(",", ":"))
    write_file(path, entries, rest)
    return fault("plan", what, path, "plan", *words)


def sealed(folder: Path) -> list[Path]:
    """The files of weights that hold a plan."""
    weights = [each for each in files_of(folder) if each.suffix == ".safetensors"]
    return [
        each for each in weights if "lowtide_plan" in read_file(each)[0].get("__metadata__", {})
    ]


DAMAGES = (
    flip,
    cut,
    grow,
    blank,
    remove,
    swap,
    header,
    header_length,
    json_field,
    json_whole,
    plan,
)
