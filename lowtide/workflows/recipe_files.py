"""Recipes: a run written down, `lowtide run recipes/x.toml`: model, method, settings, and the published row they stand for."""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lowtide.errors import BadInput
from lowtide.methods import recipe_of
from lowtide.settings import Settings, settings_from
from lowtide.workflows import to_folder


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says."""

    model: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        """The settings as `quantize` takes them."""
        return self.settings | ({"stages": self.stages} if self.stages else {})


def read(path: str | Path) -> Recipe:
    """The recipe of a file; every key, setting and option of a stage must be known."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(
            f"found no file {path}",
            "a recipe such as recipes/sd14-w4a8-tfmq.toml",
            "check the path",
        )
    try:
        found = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise BadInput(f"found {path.name} unreadable ({error})", "TOML", "mend it") from error
    known = {each.name for each in fields(Recipe)}
    if unknown := sorted(set(found) - known):
        raise BadInput(
            f"found {unknown[0]!r} in {path.name}",
            f"one of {', '.join(sorted(known))}",
            "check the spelling",
        )
    if missing := [name for name in ("model", "method") if name not in found]:
        raise BadInput(f"found no {missing[0]} in {path.name}", "a model and a method", "add it")
    recipe = Recipe(**found | {"without": tuple(found.get("without", ()))})
    recipe_of(recipe.method, settings_from(recipe.options), recipe.without)
    return recipe


def changed(settings: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Settings with `name=value` or `stage.option=value` changes; a value reads as TOML does, or as plain text."""
    settings = dict(settings)
    for change in changes:
        name, equals, value = change.partition("=")
        stage, dot, option = name.partition(".")
        if not equals or not (dot or name in {each.name for each in fields(Settings)}):
            right = "a setting and its value, such as iters=500, or a stage's option, such as omq.plus=true"
            raise BadInput(f"found --set {change}", right, "see `lowtide quantize --help`")
        if dot:
            settings["stages"] = with_option(
                settings.get("stages", {}), stage, option, plain(value)
            )
        else:
            settings[name] = plain(value)
    return settings


def with_option(
    stages: dict[str, dict[str, Any]], stage: str, option: str, value: Any
) -> dict[str, dict[str, Any]]:
    """One option more, or another value of it; a stage is called by its name in any case."""
    called = next((name for name in stages if name.lower() == stage.lower()), stage)
    return stages | {called: stages.get(called, {}) | {option: value}}


def plain(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def cook(
    path: str | Path,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    without: Sequence[str] = (),
    model: str | None = None,
) -> dict[str, Any]:
    """Run a recipe, with changes, without some stages, or on another model."""
    recipe = read(path)
    options = changed(recipe.options, changes) | {"without": (*recipe.without, *without)}
    return to_folder.quantize_to_folder(model or recipe.model, out, recipe.method, options)
