"""Typed options: check a value against its type, and show options as keywords of a function.

A value that does not fit is one plain sentence.

Types and bounds are msgspec's: `Annotated[int, Meta(ge=1)]`. The same annotations check options
that a user passes and the JSON and TOML files that lowtide reads.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from functools import partial
from inspect import Parameter, signature
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from lowtide.errors import BadInput

Face = TypeVar("Face", bound=Callable[..., object])
Count = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


def Within(least: float, most: float | None = None) -> Meta:
    """Bounds of a number, both included."""
    return Meta(ge=least, le=most)


def check(thing: type, values: Mapping[str, object], title: str = "") -> None:
    """Check values for fields of a dataclass; `title` stands before a field's name."""
    hints = get_type_hints(thing, include_extras=True)
    for name, value in values.items():
        if not fits(value, hints[name]):
            expected = words(hints[name])
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number", 1)
            raise BadInput(f"found {title}{name} {value!r}", expected, f"correct {name}")


def fits(value: object, kind: object) -> bool:
    """Whether the value is of an annotated type. NaN and infinity are no numbers here."""
    try:
        plain = _plain(value)
        msgspec.convert(plain, kind)
    except (msgspec.ValidationError, ValueError, OverflowError):
        return False
    return not isinstance(plain, list)


def _plain(value: object) -> object:
    """Numbers of other libraries as Python's own."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if not math.isfinite(value):
            raise ValueError("not a finite number")
        return float(value)
    if isinstance(value, tuple):
        return tuple(_plain(item) for item in value)
    return value


def words(kind: object) -> str:
    """An annotated type as a user reads it."""
    origin = get_origin(kind)
    if origin is Annotated:
        plain, *rules = get_args(kind)
        if titles := [rule.title for rule in rules if rule.title]:
            return titles[0]
        bounds = [bounds for rule in rules if (bounds := _bounds(rule))]
        return " ".join([words(plain), *bounds])
    if isinstance(kind, UnionType) or type(None) in get_args(kind):
        parts = [words(part) for part in get_args(kind) if part is not type(None)]
        return " or ".join(parts) + ", or nothing"
    if origin is Literal:
        return " or ".join(map(str, get_args(kind)))
    if origin in (tuple, Sequence):
        return f"a list, each {words(get_args(kind)[0])}"
    if kind == Mapping[str, object]:
        return "arguments by name, such as {'negative_prompt': 'blurry'}"
    plain_words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain_words.get(kind, "options by name, such as {'omq': {'plus': True}}")


def _bounds(rule: Meta) -> str:
    if rule.gt is not None:
        return f"above {rule.gt:g}"
    if rule.ge is None:
        return ""
    return f"at least {rule.ge:g}" if rule.le is None else f"from {rule.ge:g} to {rule.le:g}"


def as_tuple(value: object) -> object:
    """Lists and ranges as tuples, which is what fields hold."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def takes_options_of(model: type) -> Callable[[Face], Face]:
    """A decorator: `help` shows a keyword for each field of `model` in the place of **options."""
    hints = get_type_hints(model)
    keywords = [_keyword(each, hints[each.name]) for each in fields(model)]
    return partial(showing, keywords=keywords)


def _keyword(option: Field[object], annotation: object) -> Parameter:
    default = {} if option.default is MISSING else option.default
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def showing(function: Face, keywords: Iterable[Parameter]) -> Face:
    """The function, whose signature now has these keywords in the place of **options."""
    plain = signature(function)
    own = [each for each in plain.parameters.values() if each.kind != Parameter.VAR_KEYWORD]
    setattr(function, "__signature__", plain.replace(parameters=[*own, *keywords]))  # noqa: B010
    return function
