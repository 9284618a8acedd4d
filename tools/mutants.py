"""Changes of one expression that no test notices: `make mutants`, an estimated hour on two cores.

mutmut makes the changes, called mutants, and runs the tests on them. Of lowtide/formats it runs
all, of lowtide/methods and lowtide/stages a sample with a fixed seed. A mutant faces the tests that
reach its function: those of its own file, such as tests/stages/test_tape.py, and quick ones of
other files. The table by file and all survivors go to mutants/survivors.md; docs/mutants.md sorts
them by reason.
"""

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.stats import status_by_exit_code

FOLDER = Path("mutants")
STATS = FOLDER / "mutmut-stats.json"
WHOLE = "lowtide/formats/"
SAMPLED = ("lowtide/methods/", "lowtide/stages/")
SEED = 0
# Of tests that a mutant faces: those of its own file, and those of others by the mutant's room.
OWN_SECONDS = 60.0
SECONDS = {"formats": 5.0, "methods": 20.0, "stages": 20.0}
# Estimates of seconds and bytes, and lines for the terminal: other tests than these see to them.
NOT_SAMPLED = re.compile(r"cost__|_cost__|summary__|predict_plan__")
STATUSES = ("killed", "survived", "no tests", "timeout")
# Parts of a line. A change of nothing but such a part is sorted by its name.
PARTS = {
    "words": re.compile(r'"[^"]*"'),
    "another device": re.compile(r",? ?device=[\w.]+|\.to\((None|[\w.]*device)\)"),
    "dtype": re.compile(r",? ?dtype=[\w.]+"),
    "strict zip": re.compile(r",? ?strict=\w+"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=300, help="mutants of methods and stages")
    parser.add_argument("--max-children", type=int, default=2, help="processes")
    parser.add_argument("--table", action="store_true", help="only write the table of the last run")
    options = parser.parse_args()
    if not options.table:
        shutil.rmtree(FOLDER, ignore_errors=True)
        run_mutmut(["lowtide.formats.kinds.x_check_bits*"], 1)  # generates all, and times the tests
        bound_tests()
        names = [*sampled(mutants(SAMPLED), options.sample), "lowtide.formats.*"]
        run_mutmut(names, options.max_children)
    text = report(results())
    (FOLDER / "survivors.md").write_text(text)
    print(text.partition("\n## ")[0])


def run_mutmut(names: list[str], children: int) -> None:
    """Run these mutants. mutmut makes its folder, and times the tests, where that is not done."""
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(children), *names]
    subprocess.run(command, check=True)


def bound_tests() -> None:
    """Keep the quickest tests of each function, as many as fit into the seconds above."""
    stats = json.loads(STATS.read_text())
    durations = stats["duration_by_test"]
    tests = stats["tests_by_mangled_function_name"]
    bounded = {name: near(name, reached, durations) for name, reached in tests.items()}
    STATS.write_text(json.dumps(stats | {"tests_by_mangled_function_name": bounded}))


def near(name: str, tests: Iterable[str], durations: Mapping[str, float]) -> list[str]:
    """The tests of the function's own file, and quick ones of other files."""
    room, module = name.split(".")[1:3]
    own = {test for test in tests if test.startswith(f"tests/{room}/test_{module}")}
    rest = set(tests) - own
    return [*quickest(own, durations, OWN_SECONDS), *quickest(rest, durations, SECONDS[room])]


def quickest(tests: Iterable[str], durations: Mapping[str, float], seconds: float) -> list[str]:
    """As many as fit; at least one."""
    chosen: list[str] = []
    for test in sorted(tests, key=lambda test: (durations[test], test)):
        seconds -= durations[test]
        if chosen and seconds < 0:
            break
        chosen.append(test)
    return chosen


def mutants(folders: tuple[str, ...]) -> dict[str, dict[str, int | None]]:
    """The exit code of the tests by file and mutant; None for mutants that did not run."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*.py"))
    codes: dict[str, dict[str, int | None]] = {}
    for path in paths:
        data = SourceFileMutationData(path=path)
        data.load()
        codes[str(path)] = data.exit_code_by_key
    return codes


def sampled(by_file: Mapping[str, Iterable[str]], size: int) -> list[str]:
    """As many mutants of each file as its share of all, drawn with a seed of the file's own."""
    candidates = {
        path: sorted(name for name in names if not NOT_SAMPLED.search(name))
        for path, names in by_file.items()
    }
    total = sum(map(len, candidates.values()))
    chosen: list[str] = []
    for path, names in candidates.items():
        # Shuffled, not sampled: a small sample is a part of a larger one.
        random.Random(f"{SEED} {path}").shuffle(names)
        chosen += names[: round(len(names) * min(1, size / total))]
    return chosen


def results() -> Iterator[tuple[str, str, str, str]]:
    """File, mutant, status and change of every mutant that ran."""
    for path, codes in mutants((WHOLE, *SAMPLED)).items():
        for name, code in codes.items():
            status = status_by_exit_code[code]
            if status in STATUSES:
                yield path, name, status, "" if status == "killed" else change(name)


def change(name: str) -> str:
    """The removed and the added line."""
    lines = get_diff_for_mutant(name).splitlines()
    kept = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    return "\n".join(line[0] + " " + line[1:].strip() for line in kept)


def kind(change: str) -> str:
    """The part of the line that the change is confined to, or "code"."""
    before, _, after = change.replace(", )", ")").partition("\n+")
    for name, part in PARTS.items():
        if part.sub("", before[1:]) == part.sub("", after):
            return name
    return "code"


def report(rows: Iterable[tuple[str, str, str, str]]) -> str:
    rows = list(rows)
    counts = Counter((path, status) for path, _, status, _ in rows)
    lines = ["| file | mutants | killed | survived | without tests | timed out |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for path in sorted({path for path, _ in counts}):
        numbers = [counts[path, status] for status in STATUSES]
        lines.append(f"| {path} | {sum(numbers)} | {' | '.join(map(str, numbers))} |")
    for name in ("code", *PARTS):
        lost = [row for row in rows if row[3] and kind(row[3]) == name]
        lines += ["", f"## {name}: {len(lost)}", ""]
        lines += [f"{mutant} ({status})\n{text}\n" for _, mutant, status, text in lost]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
