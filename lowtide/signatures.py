"""Show the fields of a dataclass of options as keywords of a function that takes **options."""

from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from functools import partial
from inspect import Parameter, signature
from typing import TypeVar, get_type_hints

Face = TypeVar("Face", bound=Callable[..., object])


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
