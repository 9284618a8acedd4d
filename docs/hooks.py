"""Adapt pages to the site: pictures of the zoo, which lie outside docs/, and unbroken numbers."""

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.structure.files import File, Files

from lowtide.settings import EvaluationSettings, Request, Settings

NO_BREAK = "\u00a0"
ROOT = Path(__file__).parents[1]
# A page links ../lowtide/zoo/digits/samples.png, so that the link works in the repository too.
SAMPLES = re.compile(r"\]\(\.\./((?:lowtide/)?zoo/([\w-]+)/samples\.png)\)")


def on_files(files: Files, config: Any) -> Files:
    for path in [*ROOT.glob("lowtide/zoo/*/samples.png"), *ROOT.glob("zoo/*/samples.png")]:
        name = f"figures/zoo/{path.parent.name}.png"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def options_table(model: type) -> str:
    """The fields of a dataclass of settings: default and help text."""
    hints = get_type_hints(model, include_extras=True)
    rows = ["| option | default | what it is |", "| --- | --- | --- |"]
    for field in fields(model):
        metas = get_args(hints[field.name])[1:]
        help_text = next(meta.description for meta in metas if meta.description)
        default = "" if field.default in (MISSING, (), None) else f"`{field.default}`"
        rows.append(f"| `{field.name}` | {default} | {help_text} |")
    return "\n".join(rows)


def on_page_markdown(markdown: str, **_: Any) -> str:
    for model in (Settings, Request, EvaluationSettings):
        mark = f"<!-- options of {model.__name__} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, options_table(model))
    return SAMPLES.sub(r"](figures/zoo/\2.png)", markdown).replace(" ± ", f"{NO_BREAK}±{NO_BREAK}")
