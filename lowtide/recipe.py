"""Recipes: a run written down, `lowtide run recipes/x.toml`: model, method, settings, and the published row they stand for."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lowtide import run
from lowtide.errors import BadInput
from lowtide.methods import METHODS
from lowtide.plan import Settings, settings_from


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    model: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()


def read(path: str | Path) -> Recipe:
    """The recipe of a file; every key and setting must be known."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"found no file {path}", "a recipe such as recipes/sd14-w4a8-tfmq.toml", "check the path")
    try:
        found = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"found {path.name} unreadable ({error})", "TOML", "mend it") from error
    known = {each.name for each in fields(Recipe)}
    if unknown := sorted(set(found) - known):
        raise BadInput(f"found {unknown[0]!r} in {path.name}", f"one of {', '.join(sorted(known))}", "check the spelling")
    if missing := [name for name in ("model", "method") if name not in found]:
        raise BadInput(f"found no {missing[0]} in {path.name}", "a model and a method", "add it")
    recipe = Recipe(found["model"], found["method"], found.get("settings", {}), tuple(found.get("without", ())))
    if recipe.method not in METHODS:
        raise BadInput(f"found method {recipe.method!r}", f"one of {', '.join(METHODS)}", "see `lowtide methods`")
    settings_from(recipe.settings)
    return recipe


def changed(settings: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Settings with `name=value` changes; a value reads as TOML does, or as plain text."""
    settings = dict(settings)
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals or name not in {each.name for each in fields(Settings)}:
            raise BadInput(f"found --set {change}", "a setting and its value, such as iters=500", "see `lowtide quantize --help`")
        settings[name] = plain(value)
    return settings


def plain(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def cook(
    path: str | Path, out: str | Path, *, changes: Sequence[str] = (), without: Sequence[str] = (), model: str | None = None
) -> dict[str, Any]:
    """Run a recipe, with changes, without some stages, or on another model."""
    recipe = read(path)
    options = changed(recipe.settings, changes) | {"without": (*recipe.without, *without)}
    return run.quantize_to_folder(model or recipe.model, out, recipe.method, options)
