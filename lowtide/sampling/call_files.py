"""Files of arguments for a pipeline's call, `--call FILE`: JSON or YAML.

A path of a picture is relative to the file's folder.
"""

import json
from pathlib import Path

import yaml

from lowtide.errors import BadInput
from lowtide.sampling.request import PICTURES, read_text
from lowtide.settings import CallValues

YAML = (".yaml", ".yml")
_EXPECTED = "arguments by name, such as negative_prompt: blurry"


def read_call(path: Path) -> CallValues:
    """The arguments in a file."""
    text = read_text(path, "a JSON or YAML file with arguments of the pipeline's call")
    try:
        values = yaml.safe_load(text) if path.suffix.lower() in YAML else json.loads(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        raise BadInput(
            f"found {path} unreadable ({lines[0][:200]})",
            "JSON, or YAML in a .yaml file",
            "correct it",
        ) from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise BadInput(f"found no arguments in {path}", _EXPECTED, "correct it")
    return {name: _with_places(value, path.resolve().parent) for name, value in values.items()}


def _with_places(value: object, folder: Path) -> object:
    """The value with paths of pictures that are valid in any working directory."""
    if isinstance(value, str) and Path(value).suffix.lower() in PICTURES:
        return str(folder / value)
    if isinstance(value, list):
        return [_with_places(each, folder) for each in value]
    if isinstance(value, dict):
        return {name: _with_places(each, folder) for name, each in value.items()}
    return value
