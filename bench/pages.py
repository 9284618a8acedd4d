"""Draw docs/results.md and the tables of docs/methods from the finished cells in bench/results/quality: python bench/pages.py

A table of a page stands between two comments, and the first says what is in it, one of

    <!-- measured: zoo:digits | W6A6, W4A4 | tcaq, tcaq -par, tfmq | psnr, step error -->
    <!-- measured: zoo:digits | best against the papers -->
    <!-- end -->

New cells come from `lowtide bench quality zoo:digits --out bench/results/quality`, with the settings that docs/results.md names.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lowtide.errors import BadInput
from lowtide.methods import METHODS
from lowtide.settings import Settings
from lowtide.workflows import method_table

ROOT = Path(__file__).parents[1]
LEDGERS, RESULTS, PAGES = (
    ROOT / "bench/results/quality",
    ROOT / "docs/results.md",
    ROOT / "docs/methods",
)
MARKED = re.compile(r"(<!-- measured: (?P<asked>.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = {"psnr": "PSNR to float, dB", "step error": "step error", "bytes": "bytes on disk"}
STAGES = {
    type(stage).__name__.lower(): type(stage).__name__
    for recipe in METHODS.values()
    for stage in recipe(Settings())
}
Cells = Sequence[dict]


def main() -> None:
    for path, text in drawn().items():
        if path.read_text() != text:
            path.write_text(text)
            print(f"drawn anew: {path.relative_to(ROOT)}")


def drawn() -> dict[Path, str]:
    """What each page should say, by its path."""
    cells, results = {}, ""
    for path in sorted(LEDGERS.glob("*.jsonl"), key=lambda path: path.stem):
        newest = json.loads(path.read_text().splitlines()[-1])
        cells[newest["model"]] = method_table.kept(LEDGERS, newest)
        results = method_table.page(cells[newest["model"]], results)
    pages = {path: filled(path.read_text(), cells) for path in sorted(PAGES.glob("*.md"))}
    return {RESULTS: results} | pages


def filled(text: str, cells: dict[str, Cells]) -> str:
    """A page with its tables drawn from these cells."""

    def table(found: re.Match) -> str:
        model, *asked = [part.strip() for part in found["asked"].split("|")]
        if model not in cells:
            raise BadInput(
                f"found a table of {model}",
                f"one of {', '.join(cells)}",
                "run `lowtide bench quality` first",
            )
        lines = (
            against(cells[model])
            if asked == ["best against the papers"]
            else chosen(cells[model], *asked)
        )
        return found[1] + "\n".join(lines) + "\n" + found[3]

    return MARKED.sub(table, text)


def chosen(cells: Cells, widths: str, titles: str, columns: str = "psnr, step error") -> list[str]:
    """One line a method, some columns a width; a method left out of the bench at a width leaves its place empty."""
    columns = [name.strip() for name in columns.split(",")]
    places = [(width.strip(), name) for width in widths.split(",") for name in columns]
    head = [
        "",
        "seeds",
        *(
            f"{width}: {COLUMNS[name]}" if name == columns[0] else COLUMNS[name]
            for width, name in places
        ),
    ]
    rows = []
    for title in (title.strip() for title in titles.split(",")):
        groups = {width: group(cells, title, width) for width, _ in places}
        if not any(groups.values()):
            raise BadInput(
                f"found no cell of {title!r} at {widths}",
                "finished cells",
                "run `lowtide bench quality` first",
            )
        seeds = sorted({len(found) for found in groups.values() if found})
        rows.append(
            [
                readable(title),
                ", ".join(map(str, seeds)),
                *(figure(groups[width], name) for width, name in places),
            ]
        )
    return method_table.lined([head, ["---"] * len(head), *rows])


def against(cells: Cells) -> list[str]:
    """At each width best, and the single paper whose samples come nearest to the float model's."""
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
        nearest = max(
            (name for name in papers if papers[name]), key=lambda name: mean(papers[name])
        )
        ours = group(cells, "best", width)
        rows.append([width, *(figure(ours, name) for name in ("psnr", "step error")), nearest])
        rows[-1] += [figure(papers[nearest], name) for name in ("psnr", "step error")]
    return method_table.lined([head, ["---"] * len(head), *rows])


def group(cells: Cells, title: str, width: str) -> list[dict]:
    return [cell for cell in cells if cell["method"] == title and cell["width"] == width]


def mean(group: Cells) -> float:
    return float(np.mean([cell["psnr"] for cell in group]))


def figure(group: Cells, name: str) -> str:
    """As the table of results has it."""
    return (
        dict(zip(method_table.HEAD[2:], method_table.figures(group), strict=True))[COLUMNS[name]]
        if group
        else ""
    )


def readable(title: str) -> str:
    """tfmq -fsc -reconstruct -> tfmq without FSC, Reconstruct: as the stages are written."""
    name, *without = title.split(" -")
    return name + (
        " without " + ", ".join(STAGES.get(stage, stage) for stage in without) if without else ""
    )


if __name__ == "__main__":
    main()
