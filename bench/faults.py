"""Faults of disks, of people and of kills, tried on lowtide by the thousand; the table of docs/guides/trust.md.

    python bench/faults.py checkpoints [--count 5000]   damaged checkpoints, lowtide and diffusers
    python bench/faults.py kills [--count 200]          SIGKILL at random instants of commands
    python bench/faults.py events                       SIGKILL at every file-system event of an overwrite
    python bench/faults.py readers [--count 1000]       two writers and a reader of one folder

`make faults` runs all four, about an hour on two cores. Everything is made in a temporary folder of
--room. The lines of faults.jsonl there say what each trial did; what is not as it has to be is printed.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path

from faulty import trials


def checkpoints(room: Path, count: int, first: int) -> int:
    """Damage checkpoints; the number of outcomes that must not be."""
    from faulty.models import made

    models = made(room / "models")
    counted: Counter[tuple[str, str, str]] = Counter()
    with (room / "faults.jsonl").open("a") as log:
        for trial in trials.trials(models, range(first, first + count), room):
            counted[trial.kind, trial.loader, trial.outcome] += 1
            log.write(json.dumps(trials.as_json(trial)) + "\n")
            log.flush()
            if trial.outcome not in trials.GOOD:
                last = trial.said.strip().splitlines()[-1:] or [""]
                print(trial.number, trial.model, trial.loader, trial.kind, trial.what, trial.outcome, last[0][:160])
    for (kind, loader, outcome), times in sorted(counted.items()):
        print(f"{kind:32} {loader:10} {outcome:10} {times}")
    return sum(times for (_, _, outcome), times in counted.items() if outcome not in trials.GOOD)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["checkpoints"])
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0, help="the first number of a damage")
    parser.add_argument("--room", type=Path, help="where everything is made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.room) as place:
        room = arguments.room or Path(place)
        wrong = checkpoints(room, arguments.count, arguments.first)
    print(f"{wrong} outcomes that must not be")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
