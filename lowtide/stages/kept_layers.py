"""Which modules `keep_float` names: by a part of their dotted name, with * for anything."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import chain, combinations

from lowtide.errors import BadInput

REASON = "kept in float (keep_float)"


def named_by(patterns: Sequence[str], name: str) -> list[str]:
    """The patterns that name this module or one around it.

    A pattern is a run of whole parts of the name: conv_out, mid_block, resnets.0, *.to_q.
    """
    parts = name.split(".")
    ends = combinations(range(len(parts) + 1), 2)
    spans = [".".join(parts[start:end]) for start, end in ends]
    return [each for each in patterns if any(fnmatchcase(span, each) for span in spans)]


def kept_in_float(
    patterns: Sequence[str], names: Iterable[str], option: str = "keep_float"
) -> list[str]:
    """The modules of these that the patterns of an option name; one that names none is an error."""
    found = {name: named_by(patterns, name) for name in names}
    used = set(chain.from_iterable(found.values()))
    if unused := [pattern for pattern in patterns if pattern not in used]:
        shown = ", ".join(list(found)[:4])
        raise BadInput(
            f"found {unused[0]!r} in {option}, which names no layer",
            f"names or parts of names of its layers ({shown}, ...)",
            "see the names with `lowtide inspect`",
        )
    return [name for name, matching in found.items() if matching]
