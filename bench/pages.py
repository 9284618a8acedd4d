"""Write docs/results.md and the tables of docs/methods: python bench/pages.py

The numbers come from the finished cells in bench/results/quality. A table of a page stands between
two comments. The first comment says what is in the table, in one of two forms:

    <!-- measured: zoo:digits | W6A6, W4A4 | tcaq, tcaq -par, tfmq | psnr, step error -->
    <!-- measured: zoo:digits | best against the papers -->
    <!-- end -->

`lowtide bench quality zoo:digits --out bench/results/quality` makes new cells. Use the settings
that docs/results.md names.
"""

import json
import re
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path

import numpy as np

from lowtide.errors import BadInput
from lowtide.methods import METHODS
from lowtide.settings import Settings
from lowtide.workflows import method_ranks, method_table

ROOT = Path(__file__).parents[1]
LEDGERS = ROOT / "bench/results/quality"
RESULTS = ROOT / "docs/results.md"
PAGES = ROOT / "docs/methods"
MARKED = re.compile(r"(<!-- measured: (?P<contents>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {"psnr": "PSNR to float, dB", "step error": "step error", "bytes": "bytes on disk"}
RECIPES = [recipe(Settings()) for recipe in METHODS.values()]
NAMES = [type(stage).__name__ for stage in chain.from_iterable(RECIPES)]
STAGES = {name.lower(): name for name in NAMES}
Cells = Sequence[dict]


def main() -> None:
    for path, text in drawn().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"drawn anew: {path.relative_to(ROOT)}")


def drawn() -> dict[Path, str]:
    """What each page should say, by its path."""
    cells: dict[str, Cells] = {}
    results = ""
    for path in sorted(LEDGERS.glob("*.jsonl"), key=lambda path: path.stem):
        newest = json.loads(path.read_text().splitlines()[-1])
        # Older formats of files hold the same models: their rows stay until they are made anew.
        alike = {name: value for name, value in newest.items() if name != "format"}
        cells[newest["model"]] = method_table.finished_cells(LEDGERS, alike)
        results = method_ranks.page(cells[newest["model"]], results)
    pages = {path: filled(path.read_text(), cells) for path in sorted(PAGES.glob("*.md"))}
    return {RESULTS: results} | pages


def filled(text: str, cells: dict[str, Cells]) -> str:
    """A page with its tables drawn from these cells."""

    def table(marks: re.Match) -> str:
        parts = [part.strip() for part in marks["contents"].split("|")]
        model, *columns = parts
        if model not in cells:
            raise BadInput(
                f"found a table of {model}",
                f"one of {', '.join(cells)}",
                "run `lowtide bench quality` first",
            )
        if columns == ["best against the papers"]:
            lines = against(cells[model])
        else:
            lines = chosen(cells[model], *columns)
        return marks[1] + "\n".join(lines) + "\n" + marks[3]

    return MARKED.sub(table, text)


def chosen(cells: Cells, widths: str, titles: str, columns: str = "psnr, step error") -> list[str]:
    """One line a method, some columns a width; a cell that was not run leaves its place empty."""
    measures = split(columns)
    places = list(product(split(widths), measures))
    head = ["", "seeds"]
    for width, name in places:
        head.append(f"{width}: {COLUMNS[name]}" if name == measures[0] else COLUMNS[name])
    rows = []
    for title in split(titles):
        groups = {width: group(cells, title, width) for width, _ in places}
        if not any(groups.values()):
            raise BadInput(
                f"found no cell of {title!r} at {widths}",
                "finished cells",
                "run `lowtide bench quality` first",
            )
        seeds = ", ".join(map(str, sorted({len(cells) for cells in groups.values() if cells})))
        figures = [figure(groups[width], name) for width, name in places]
        rows.append([readable(title), seeds, *figures])
    return method_ranks.lined([head, ["---"] * len(head), *rows])


def split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",")]


def against(cells: Cells) -> list[str]:
    """At each width: best, and the paper whose answers are nearest to the float model's."""
    head = [
        "bits",
        "best: PSNR to float, dB",
        "step error",
        "nearest paper",
        "PSNR to float, dB",
        "step error",
    ]
    rows = []
    for width in dict.fromkeys(cell["width"] for cell in cells):
        papers = {
            name: group(cells, name, width) for name in METHODS if name not in ("best", "minmax")
        }
        nearest = min(
            (name for name in papers if papers[name]), key=lambda name: mean(papers[name])
        )
        ours = group(cells, "best", width)
        rows.append([width, *(figure(ours, name) for name in ("psnr", "step error")), nearest])
        rows[-1] += [figure(papers[nearest], name) for name in ("psnr", "step error")]
    return method_ranks.lined([head, ["---"] * len(head), *rows])


def group(cells: Cells, title: str, width: str) -> list[dict]:
    return [cell for cell in cells if cell["method"] == title and cell["width"] == width]


def mean(group: Cells) -> float:
    return float(np.mean([cell["step_error"] for cell in group]))


def figure(group: Cells, name: str) -> str:
    """One figure as the table of results shows it."""
    if not group:
        return ""
    figures = dict(zip(method_ranks.FIGURES, method_ranks.figures(group), strict=True))
    return figures[COLUMNS[name]]


def readable(title: str) -> str:
    """tfmq -fsc -reconstruct -> tfmq without FSC, Reconstruct."""
    name, *without = title.split(" -")
    stages = ", ".join(STAGES.get(stage, stage) for stage in without)
    return f"{name} without {stages}" if without else name


if __name__ == "__main__":
    main()
