"""The kinds of formats: which bit-widths exist, and formats as JSON for the checkpoint."""

from dataclasses import asdict
from typing import Any

from lowtide.errors import BadInput
from lowtide.formats.adaptive import Adaptive
from lowtide.formats.affine import Affine
from lowtide.formats.log2 import Log2
from lowtide.formats.mixed import Mixed
from lowtide.formats.own_range import OwnRange
from lowtide.formats.stepped import Stepped

WeightFormat = Affine | Mixed
InputFormat = Affine | Log2 | Adaptive | Stepped | OwnRange
Format = Affine | Mixed | Log2 | Adaptive | Stepped | OwnRange
# The kind of a format and its fields, which differ between the kinds.
FormatJson = dict[str, Any]
# "either" is the former name of Adaptive. It stays, because it is part of the file format.
KINDS: dict[str, type[Format]] = {
    "affine": Affine,
    "mixed": Mixed,
    "log2": Log2,
    "either": Adaptive,
    "stepped": Stepped,
    "own_range": OwnRange,
}
FLOAT_BITS = (16, 32)


def most_bits(format: Format) -> int:
    """The bits of a format; the most, where channels or steps differ."""
    return format.bits if isinstance(format.bits, int) else max(format.bits)


def check_bits(bits: int, what: str) -> int:
    """Refuse other bit-widths than 1 to 8, and 16 and 32, which leave the values in float."""
    is_integer = isinstance(bits, int) and not isinstance(bits, bool)
    if not is_integer or not (1 <= bits <= 8 or bits in FLOAT_BITS):
        raise BadInput(
            f"found {bits!r} bits for {what}",
            "1 to 8, or 16 or 32 to leave them in float",
            "choose one of those",
        )
    return bits


def format_to_json(format: Format | None) -> FormatJson | None:
    """A format as JSON.

    Bit-widths of channels or steps are a string with a digit for each: half as long as a list.
    """
    if format is None:
        return None
    kind = next(name for name, cls in KINDS.items() if type(format) is cls)
    fields = asdict(format)
    if isinstance(format, Mixed | Stepped):
        fields["bits"] = "".join(map(str, format.bits))
    return {"kind": kind} | fields


def format_from_json(data: FormatJson | None) -> Format | None:
    """The inverse of format_to_json. It also reads bit-widths of channels from a list."""
    if data is None:
        return None
    fields = {name: value for name, value in data.items() if name != "kind"}
    if not isinstance(fields["bits"], int):
        fields["bits"] = tuple(map(int, fields["bits"]))
    return KINDS[data["kind"]](**fields)
