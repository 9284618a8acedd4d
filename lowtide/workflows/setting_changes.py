"""Changes of settings as text: `name=value` or `stage.option=value`, as --set takes them."""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields

from lowtide.errors import BadInput
from lowtide.settings import Options, Settings, StageOptions


def changed(settings: Mapping[str, object], changes: Iterable[str]) -> Options:
    """Settings with `name=value` or `stage.option=value` changes.

    A value reads as TOML does, or as plain text.
    """
    result: Options = dict(settings)
    for change in changes:
        name, equals, text = change.partition("=")
        stage, dot, option = name.partition(".")
        if not equals or not (dot or name in {each.name for each in fields(Settings)}):
            raise BadInput(
                f"found --set {change}",
                "a setting and its value, such as iters=500, or a stage's option, omq.plus=true",
                "see `lowtide quantize --help`",
            )
        if name == "memory":
            raise BadInput(f"found --set {change}", "the option --memory, in MiB", "use --memory")
        if dot:
            result["stages"] = _with_option(result.get("stages", {}), stage, {option: _value(text)})
        else:
            result[name] = _value(text)
    return result


def _with_option(
    stages: StageOptions, stage: str, option: Mapping[str, object]
) -> dict[str, Mapping[str, object]]:
    """One more option of a stage, or another value of it; a stage's name has any case."""
    name = next((known for known in stages if known.lower() == stage.lower()), stage)
    return {**stages, name: {**stages.get(name, {}), **option}}


def _value(text: str) -> object:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
