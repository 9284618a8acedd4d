"""Recipe files: runs written down, one file a model and data set, one row a published result.

    model = "CompVis/stable-diffusion-v1-4"

    [settings]                  what all rows share
    steps = 50

    [rows.w4a8-tfmq]            `lowtide run recipes/sd14.toml w4a8-tfmq --out DIR`
    method = "tfmq"
    published = "FID 13.21"     the paper's number
    ours = "not run here"       ours
    settings = { weights = 4 }  what this row alone sets
    stages.omq.plus = true      options of stages

A file of one run may leave the table of rows out, and say method and settings at the top.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from lowtide.errors import BadInput
from lowtide.methods import recipe_of, with_profile
from lowtide.settings import Options, settings_from
from lowtide.workflows import to_folder
from lowtide.workflows.setting_changes import changed


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One run: a method, its settings, and the published result it stands for."""

    method: str
    settings: Options = {}
    without: tuple[str, ...] = ()
    stages: dict[str, dict[str, object]] = {}
    published: str = ""
    ours: str = ""
    note: str = ""


class RecipeFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a recipe file says."""

    model: str
    settings: Options = {}
    rows: dict[str, Row] = {}

    def options(self, row: Row) -> Options:
        """The settings of a row as `quantize` takes them."""
        stages = {"stages": row.stages} if row.stages else {}
        return {**self.settings, **row.settings, **stages}

    def row(self, name: str | None) -> Row:
        """The row of that name, or the only one."""
        if name is None and len(self.rows) == 1:
            return next(iter(self.rows.values()))
        if name is None or name not in self.rows:
            found = f"found no row {name!r}" if name else f"found {len(self.rows)} rows"
            raise BadInput(found, f"one of {', '.join(self.rows)}", "name it after the file")
        return self.rows[name]


def read(path: str | Path) -> RecipeFile:
    """The recipe file of that path; every key, setting and option of a stage must be known."""
    path = Path(path)
    recipe = _recipe(path, _table(path))
    for row in recipe.rows.values():
        settings = with_profile(row.method, settings_from(recipe.options(row)))
        recipe_of(row.method, settings, row.without)
    return recipe


def _table(path: Path) -> dict[str, object]:
    """The TOML of a file."""
    expected = "a recipe such as recipes/sd14.toml"
    try:
        if not path.is_file():
            raise BadInput(f"found no file {path}", expected, "check the path")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise BadInput(f"found {path.name} unreadable ({error})", "TOML", "correct it") from error


def _recipe(path: Path, table: Mapping[str, object]) -> RecipeFile:
    """The table as a recipe file; a single run at the top is one row."""
    whole = dict(table)
    if "rows" not in whole:
        top = {name: whole.pop(name) for name in list(whole) if name != "model"}
        whole["rows"] = {path.stem: top}
    try:
        return msgspec.convert(whole, RecipeFile)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`", "'")
        raise BadInput(
            f"found {path.name} with a mistake ({reason})",
            "model, settings and rows, each row with a method",
            "compare it with recipes/sd14.toml",
        ) from error


def device_of_row(path: str | Path, row: str | None, changes: Sequence[str] = ()) -> str:
    """The device that a row of a recipe file names, with these changes."""
    recipe = read(path)
    return settings_from(changed(recipe.options(recipe.row(row)), changes)).device


def run_row(
    path: str | Path,
    row: str | None,
    out: str | Path,
    *,
    changes: Sequence[str] = (),
    without: Sequence[str] = (),
    model: str | None = None,
) -> dict[str, object]:
    """Run a row of a recipe file, with changes, without some stages, or on another model."""
    recipe = read(path)
    chosen = recipe.row(row)
    options = changed(recipe.options(chosen), changes) | {"without": (*chosen.without, *without)}
    return to_folder.quantize_to_folder(model or recipe.model, out, chosen.method, options)
