"""The tables of the parts of bench/gpu, as Markdown.

    PYTHONPATH=.:bench python -m gpu.table DIR        prints them, and what passed

DIR holds PART.json of each part, and status.txt with lines of "part, exit code, seconds".
"""

import json
import sys
from pathlib import Path
from typing import Any

from gpu.part import LATE

Row = dict[str, Any]
PARTS = ("devices", "methods", "kernels", "steps", "minutes")
CODES = {0: "passed", 3: "the card was lost", 4: "some rows failed", 124: "out of time"}
LABELS = ("model", "method", "variant", "batch", "shape", "block")


def shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "/").replace("\n", " ")


def is_late(row: Row) -> bool:
    """Whether the part's time limit had passed before this row could start."""
    return str(row.get("failed", "")).endswith(("were over", LATE))


def counts(rows: list[Row]) -> list[int]:
    """How many rows passed, failed, were left out, and were not reached."""
    late = sum(map(is_late, rows))
    failed = sum("failed" in row for row in rows) - late
    skipped = sum("skipped" in row for row in rows)
    return [len(rows) - failed - late - skipped, failed, skipped, late]


def markdown(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def part_table(rows: list[Row]) -> list[str]:
    """All rows that began; the columns are the numbers that any of them has."""
    begun = [row for row in rows if not is_late(row)]
    names = dict.fromkeys(name for row in begun for name in row)
    labels = [name for name in LABELS if name in names]
    plain = [
        name
        for name in names
        if name not in (*labels, "failed", "skipped")
        and not any(isinstance(row.get(name), list | dict) for row in begun)
    ]
    last = [name for name in ("failed", "skipped") if name in names]
    head = [*labels, *plain, *last]
    return markdown(head, [[shown(row.get(name, "")) for name in head] for row in begun])


def statuses(folder: Path) -> dict[str, tuple[int, str]]:
    """The latest exit code and seconds of each part that ran."""
    path = folder / "status.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    words = [line.split() for line in lines]
    return {part: (int(code), seconds) for part, code, seconds in words}


def tables(folder: Path) -> list[str]:
    found = statuses(folder)
    lines: list[str] = []
    summary: list[list[str]] = []
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists() and part not in found:
            continue
        content = json.loads(path.read_text()) if path.exists() else {"rows": [], "machine": {}}
        facts = ", ".join(shown(value) for value in content["machine"].values())
        lines += [f"## {part}", "", facts, "", *part_table(content["rows"])]
        code, seconds = found.get(part, (None, ""))
        end = "no status" if code is None else CODES.get(code, f"ended with {code}")
        if part == "kernels" and code == 1:
            end = CODES[4]
        summary.append([part, end, *map(str, counts(content["rows"])), seconds])
    head = ["part", "end", "passed", "failed", "left out", "not reached", "seconds"]
    return [*lines, "## what passed", "", *markdown(head, summary)]


if __name__ == "__main__":
    print("\n".join(tables(Path(sys.argv[1]))))
