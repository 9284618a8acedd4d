"""Options of the command line, made from the typed settings: names, types, defaults, help, panels.

What a terminal writes differently from Python stands in `_TEXTS`: lists, files and mebibytes.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import partial
from inspect import Parameter
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from msgspec import Meta

from lowtide.errors import BadInput
from lowtide.settings import MACHINE, Options, SamplerChoice, SchedulerName, SpacingName
from lowtide.settings import Device as DeviceSetting
from lowtide.settings import Spacing as SpacingSetting
from lowtide.validation import showing

MOST_NUMBERS = 100_000
_SHORT = {"weights": "-w", "inputs": "-a"}


def numbers(text: str) -> tuple[int, ...]:
    """'0-3,8' -> 0, 1, 2, 3, 8."""
    values: list[int] = []
    for part in filter(None, text.replace(" ", "").split(",")):
        match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part, re.ASCII)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not 0 < len(span) <= MOST_NUMBERS:
            raise BadInput(
                f"found {part!r}",
                f"numbers and ranges such as 0-9,12, at most {MOST_NUMBERS} long",
                "correct it",
            )
        values += span
    return tuple(values)


def names(text: str) -> tuple[str, ...] | None:
    """'psnr, ssim' -> psnr, ssim; nothing where nothing is written."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) or None


def prompts(path: Path | None) -> tuple[str, ...]:
    """The prompts of a file, one a line."""
    if path is None:
        return ()
    from lowtide.sampling import read_prompts  # torch comes with it: only where a file is named

    return read_prompts(path)


def call(path: Path | None) -> Mapping[str, object]:
    """The arguments of the pipeline's call in a file."""
    if path is None:
        return {}
    from lowtide.sampling import read_call  # torch comes with it

    return read_call(path)


def mebibytes(count: int) -> int:
    """MiB as bytes."""
    return count << 20


def limit(count: int | None) -> int | None:
    """A limit in MiB as bytes."""
    return None if count is None else mebibytes(count)


@dataclass(frozen=True)
class _Text:
    """How a field is written on the command line, and how that becomes its value."""

    type: object
    default: object
    value: Callable[[Any], object]
    help: str | None = None


_TEXTS = {
    "prompts": _Text(
        Path | None, None, prompts, "A file with one prompt a line; without it, a built-in list."
    ),
    "labels": _Text(str, "", numbers),
    "seeds": _Text(str, "0-63", numbers),
    "metrics": _Text(str, "", names),
    "keep_float": _Text(str, "", lambda text: names(text) or ()),
    "dataset": _Text(Path | None, None, lambda path: None if path is None else str(path)),
    "pictures": _Text(Path | None, None, lambda path: None if path is None else str(path)),
    "call": _Text(
        Path | None,
        None,
        call,
        "A JSON or YAML file with more arguments of the pipeline's call, such as a negative "
        "prompt; paths of pictures become pictures.",
    ),
    "memory": _Text(
        int, 128, mebibytes, "MiB of calibration data to hold in memory; the rest goes to disk."
    ),
}
# `--set stage.option=value` sets these.
_NOT_ON_THE_COMMAND_LINE = ("stages",)


def _plain(kind: object) -> Any:
    """The type that typer reads: without bounds, whole numbers for a choice of numbers."""
    if get_origin(kind) is Annotated:
        return _plain(get_args(kind)[0])
    if isinstance(kind, UnionType) or type(None) in get_args(kind):
        return _plain(next(part for part in get_args(kind) if part is not type(None))) | None
    if get_origin(kind) is Literal and isinstance(get_args(kind)[0], int):
        return int
    return kind


def _metas(kind: object) -> list[Meta]:
    return [part for part in get_args(kind)[1:] if isinstance(part, Meta)]


def about(name: str, kind: object, help: str | None = None) -> Any:
    """The flags, the help and the panel of an option, from its annotation in settings.py."""
    meta = next(meta for meta in _metas(kind) if meta.description)
    flags = [f"--{name.replace('_', '-')}"]
    if name in _SHORT:
        flags.insert(0, _SHORT[name])
    panel = (meta.extra or {}).get("panel")
    return typer.Option(*flags, help=help or meta.description, rich_help_panel=panel)


MaxMemory = Annotated[
    int | None,
    typer.Option(
        help="MiB of memory; more than that, as predicted, is refused.", rich_help_panel=MACHINE
    ),
]
MaxDisk = Annotated[
    int | None,
    typer.Option(
        help="MiB of disk; more than that, as predicted, is refused.", rich_help_panel=MACHINE
    ),
]
OUTPUT = "Output"
Out = Annotated[Path, typer.Option("--out", help="Where the result goes.", rich_help_panel=OUTPUT)]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as one JSON object.", rich_help_panel=OUTPUT),
]
Device = Annotated[str, about("device", DeviceSetting)]
Sampler = Annotated[SchedulerName | None, about("scheduler", SamplerChoice)]
Spacing = Annotated[SpacingName | None, about("spacing", SpacingSetting)]


def show(result: Mapping[str, object], as_json: bool, lines: Sequence[str]) -> None:
    """Print a result as lines of text, or as one JSON object."""
    print(json.dumps(result) if as_json else "\n".join(lines))


def _parameter(option: Field[object], kind: object, default: object) -> Parameter:
    """One option of a command."""
    text = _TEXTS.get(option.name)
    plain = text.type if text else _plain(kind)
    annotation = Annotated[plain, about(option.name, kind, text.help if text else None)]
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _default(option: Field[object], defaults: Mapping[str, object]) -> object:
    if option.name in defaults:
        return defaults[option.name]
    if option.name in _TEXTS:
        return _TEXTS[option.name].default
    return None if option.default is MISSING else option.default


def parameters(model: type, defaults: Mapping[str, object]) -> list[Parameter]:
    """An option for each field of a dataclass of settings."""
    hints = get_type_hints(model, include_extras=True)
    shown = [each for each in fields(model) if each.name not in _NOT_ON_THE_COMMAND_LINE]
    return [_parameter(each, hints[each.name], _default(each, defaults)) for each in shown]


def options_of(model: type, **defaults: object) -> Callable[[Callable], Callable]:
    """Give a command the options of a dataclass in the place of its `**options`."""
    return partial(showing, keywords=parameters(model, defaults))


def values(options: Mapping[str, object]) -> Options:
    """Options as the command line wrote them -> as Python has them."""
    return {
        name: _TEXTS[name].value(value) if name in _TEXTS else value
        for name, value in options.items()
    }


MODEL = "Model"
Model = Annotated[str, typer.Argument(help="A hub id, a local diffusers folder, or zoo:NAME.")]
Change = Annotated[
    list[str],
    typer.Option(
        "--set",
        help="Change a setting, iters=500, or a stage's option, omq.plus=true; once for each.",
        rich_help_panel=MODEL,
    ),
]
