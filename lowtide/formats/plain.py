"""Formats by name: which bit-widths exist, and formats as JSON for the checkpoint."""

from dataclasses import asdict

from lowtide.errors import BadInput
from lowtide.formats.adaptive import Adaptive
from lowtide.formats.affine import Affine
from lowtide.formats.log2 import Log2
from lowtide.formats.mixed import Mixed

Format = Affine | Mixed | Log2 | Adaptive
KINDS = {"affine": Affine, "mixed": Mixed, "log2": Log2, "either": Adaptive}
FLOAT_BITS = (16, 32)


def check_bits(bits: int, what: str) -> int:
    """1 to 8 bits, or 16 / 32 for "left in float"."""
    if (
        isinstance(bits, bool)
        or not isinstance(bits, int)
        or not (1 <= bits <= 8 or bits in FLOAT_BITS)
    ):
        raise BadInput(
            f"found {bits!r} bits for {what}",
            "1 to 8, or 16 or 32 to leave them in float",
            "choose one of those",
        )
    return bits


def format_to_json(format: Format | None) -> dict | None:
    """A format as JSON. Bits that differ by channel are a string, a digit each, which is half of a list."""
    if format is None:
        return None
    kind = next(name for name, of in KINDS.items() if type(format) is of)
    fields = {
        name: "".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in asdict(format).items()
    }
    return {"kind": kind} | fields


def format_from_json(data: dict | None) -> Format | None:
    if data is None:
        return None
    given = {name: value for name, value in data.items() if name != "kind"}
    fields = {
        name: tuple(map(int, value)) if isinstance(value, str | list) else value
        for name, value in given.items()
    }
    return KINDS[data["kind"]](**fields)
