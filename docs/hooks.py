"""Adapt pages to the site: pictures of the zoo, which lie outside docs/, and unbroken numbers."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

NO_BREAK = "\u00a0"
ROOT = Path(__file__).parents[1]
# A page links ../lowtide/zoo/digits/samples.png, so that the link works in the repository too.
SAMPLES = re.compile(r"\]\(\.\./((?:lowtide/)?zoo/([\w-]+)/samples\.png)\)")


def on_files(files: Files, config: Any) -> Files:
    for path in [*ROOT.glob("lowtide/zoo/*/samples.png"), *ROOT.glob("zoo/*/samples.png")]:
        name = f"figures/zoo/{path.parent.name}.png"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return SAMPLES.sub(r"](figures/zoo/\2.png)", markdown).replace(" ± ", f"{NO_BREAK}±{NO_BREAK}")
