"""Faults of disks, people and kills, tried by the thousand; docs/guides/trust.md has the table.

    python bench/faults.py checkpoints [--count 5000]   damaged checkpoints, lowtide and diffusers
    python bench/faults.py kills [--count 200]          SIGKILL at random instants of commands
    python bench/faults.py events                       SIGKILL at each file-system event
    python bench/faults.py readers [--count 1000]       two writers and a reader of one folder

`make faults` runs all four. --room keeps the models, and a line for each trial in faults.jsonl.
What is not as it has to be is printed, and the exit code is 1.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from faulty import models, trials
from faulty.kills import Case, at_events, at_random, is_whole
from faulty.readers import read_while_written

COUNTS = {"checkpoints": 5000, "kills": 200, "events": 0, "readers": 1000}


def checkpoints(room: Path, count: int, first: int, only: str | None = None) -> int:
    """Damage checkpoints; the number of outcomes that must not be."""
    found = trials.trials(models.made(room / "models"), range(first, first + count), room)
    return counted(
        room, found, trials.is_right, lambda each: (each.kind, each.loader, each.outcome)
    )


def chosen(room: Path, only: str | None) -> list[Case]:
    return [case for case in models.cases(room / "models") if only in (None, case.name)]


def kills(room: Path, count: int, first: int, only: str | None = None) -> int:
    cases = chosen(room, only)
    found = at_random(cases, count, room / "killed", seed=first)
    return counted(room, found, is_whole, lambda each: (each.command, each.left, each.ended))


def events(room: Path, count: int, first: int, only: str | None = None) -> int:
    wrong = 0
    for case in chosen(room, only):
        found = at_events(case, room / "killed", count or None)
        key = lambda each: (each.command, each.left, each.ended)  # noqa: E731
        wrong += counted(room, found, is_whole, key)
    return wrong


def readers(room: Path, count: int, first: int, only: str | None = None) -> int:
    pair = models.pair(room / "models")
    found = read_while_written(pair, room / "shared", count)
    for outcome, times in sorted(found.items()):
        print(f"{times:6} {outcome}", flush=True)
    return sum(
        times for outcome, times in found.items() if outcome not in (pair[0].name, pair[1].name)
    )


def counted(
    room: Path, found: Iterable[Any], is_good: Callable[[Any], bool], key: Callable[[Any], tuple]
) -> int:
    """Log each trial, print the wrong ones and a table; the number of wrong ones."""
    table: Counter[tuple] = Counter()
    wrong = 0
    with (room / "faults.jsonl").open("a") as log:
        for each in found:
            log.write(json.dumps(asdict(each)) + "\n")
            log.flush()
            table[key(each)] += 1
            if not is_good(each):
                wrong += 1
                print("WRONG", json.dumps(asdict(each))[:600], flush=True)
    for name, times in sorted(table.items()):
        print(f"{times:6} {' | '.join(name)}", flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(COUNTS))
    parser.add_argument("--count", type=int)
    parser.add_argument("--first", type=int, default=0, help="the number of the first damage")
    parser.add_argument("--only", help="one command of kills and events, such as save")
    parser.add_argument("--room", type=Path, help="where everything is made and kept")
    arguments = parser.parse_args()
    part = {"checkpoints": checkpoints, "kills": kills, "events": events, "readers": readers}
    count = COUNTS[arguments.part] if arguments.count is None else arguments.count
    with tempfile.TemporaryDirectory() as place:
        room = arguments.room or Path(place)
        room.mkdir(parents=True, exist_ok=True)
        wrong = part[arguments.part](room, count, arguments.first, arguments.only)
    print(f"{arguments.part}: {wrong} outcomes that must not be", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
