"""Headers of safetensors files, read within bounds: what is wrong names the file and the tensor."""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowtide.errors import BadInput

METADATA = "__metadata__"
MOST = 100_000_000  # bytes of a header, which safetensors reads too
# Bytes of a value of each type.
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """The length of a safetensors file's header, and what it says; its entries fit the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            first = file.read(8)
            [length] = struct.unpack("<Q", first) if len(first) == 8 else [MOST + 1]
            text = file.read(length) if length <= min(MOST, size - 8) else b""
    except OSError as error:
        raise _damaged(path, f"unreadable ({error.strerror})") from error
    if not text:
        raise _damaged(path, f"cut short or without a header ({size:,} bytes)")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "with a header that is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "with a header that names no tensors")
    _check_metadata(path, header.get(METADATA, {}))
    _check_entries(path, header, size - 8 - length)
    return length, header


def _damaged(path: Path, how: str) -> BadInput:
    return BadInput(
        f"found {path.name} in {path.parent} {how}",
        "a whole safetensors file",
        "copy or download it again",
    )


def _check_metadata(path: Path, entries: object) -> None:
    is_text = isinstance(entries, dict) and all(isinstance(each, str) for each in entries.values())
    if not is_text:
        raise _damaged(path, "with metadata that is not text by name")


def _check_entries(path: Path, header: Mapping[str, Any], room: int) -> None:
    """Tensors have a type and a shape that fit their bytes, which follow one another to the end."""
    spans = [(_span(path, name, entry), name) for name, entry in header.items() if name != METADATA]
    end = 0
    for (start, stop), name in sorted(spans):
        if start != end or stop > room:
            raise _damaged(path, f"where tensor {name} has bytes {start:,} to {stop:,} of {room:,}")
        end = stop
    if end != room:
        raise _damaged(path, f"with {room:,} bytes of tensors, of which its header names {end:,}")


def _span(path: Path, name: str, entry: object) -> tuple[int, int]:
    fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
    size = SIZES.get(str(fields.get("dtype")))
    shape = _counts(fields.get("shape"))
    offsets = _counts(fields.get("data_offsets"))
    if size is None or shape is None or offsets is None or len(offsets) != 2:
        raise _damaged(path, f"where tensor {name} has no known type, shape or place")
    start, end = offsets
    if end - start != math.prod(shape) * size:
        raise _damaged(path, f"where tensor {name} has {end - start:,} bytes of another shape")
    return start, end


def _counts(value: object) -> list[int] | None:
    """The value, if it is a list of whole numbers from 0."""
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        return None
    return value
