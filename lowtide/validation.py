"""Whether what somebody gave is of the kind that a dataclass declares, and within its bounds; else one sentence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from lowtide.errors import BadInput


@dataclass(frozen=True)
class Within:
    """The bounds of a number, both included unless it is to be `above` the lower one: `Annotated[int, Within(1)]`."""

    least: float
    most: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.above:
            return f"above {self.least}"
        return (
            f"at least {self.least}"
            if math.isinf(self.most)
            else f"from {self.least} to {self.most}"
        )


Count = Annotated[int, Within(1)]
Share = Annotated[float, Within(0, 1)]
Positive = Annotated[float, Within(0, above=True)]
NotNegative = Annotated[float, Within(0)]


def check(thing: type, given: Mapping[str, Any], title: str = "") -> None:
    """Values for fields of this dataclass; `title` comes before a field's name where it says little alone."""
    kinds = get_type_hints(thing, include_extras=True)
    for name, value in given.items():
        if not fits(value, kinds[name]):
            raise BadInput(
                f"found {title}{name} {value!r}", words(kinds[name]), f"give another {name}"
            )


def fits(value: Any, kind: Any) -> bool:
    """Whether the value is of an annotated kind; true and false are no numbers here, whole numbers do for others."""
    if get_origin(kind) is Annotated:
        plain, *rules = get_args(kind)
        return fits(value, plain) and all(rule.holds(value) for rule in rules)
    if isinstance(kind, UnionType) or type(None) in get_args(kind):
        return any(fits(value, each) for each in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(each, get_args(kind)[0]) for each in value)
    if get_origin(kind) is Mapping:
        return isinstance(value, Mapping) and all(
            fits(each, get_args(kind)[1]) for each in value.values()
        )
    if kind in (int, float):
        return isinstance(value, Integral if kind is int else Real) and not isinstance(value, bool)
    return kind is Any or isinstance(value, kind)


def words(kind: Any) -> str:
    """An annotated kind as a user reads it."""
    if get_origin(kind) is Annotated:
        plain, *rules = get_args(kind)
        return " ".join([words(plain), *map(str, rules)])
    if isinstance(kind, UnionType) or type(None) in get_args(kind):
        return (
            " or ".join(words(each) for each in get_args(kind) if each is not type(None))
            + ", or nothing"
        )
    if get_origin(kind) is tuple:
        return f"a list, each {words(get_args(kind)[0])}"
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return known.get(kind, "options by name, such as {'omq': {'plus': True}}")


def listed(value: Any) -> Any:
    """Lists and ranges as tuples, which is what fields hold."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def check_eta(eta: float | None) -> None:
    if eta is not None and not 0 <= eta <= 1:
        raise BadInput(
            f"found eta {eta}",
            "0, no noise of the sampler's own, to 1, as much as DDPM adds",
            "choose one, or none",
        )
