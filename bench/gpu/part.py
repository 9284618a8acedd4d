"""What the parts of bench/gpu share: their options, the file of their rows, limits, times.

A part is a list of rows. Its file is written before and after each row, so that whatever ends the
process leaves all rows before it. A row that fails does not stop the next one. After a broken CUDA
context nothing runs any more in the same process: the part then ends with LOST, and run.sh starts
it again with --resume, which goes on behind the last row.
"""

import argparse
import faulthandler
import json
import os
import platform
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowtide.machine.devices import synchronize

Row = dict[str, Any]
PASSED = 0
FAILED = 4  # some rows failed; Python itself ends with 1 and 2
LOST = 3  # the card does not answer any more
STARTED = "the process ended in this row"
LATE = "not reached: the time limit of the part had passed"
GRACE = 15  # seconds that a row has to stop by itself before its process is ended
REPEATS = 15


class TimeOver(Exception):
    """A row took longer than it may."""


def options(purpose: str, arguments: list[str] | None, seconds: float) -> argparse.Namespace:
    """The options that every part has; `seconds` is the default of the part's limit."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models, as a test of this file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--seconds", type=float, default=seconds, help="no row starts after this")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file holds")
    return parser.parse_args(arguments)


class Sheet:
    """The rows of one part, and the file that holds them."""

    def __init__(self, name: str, given: argparse.Namespace):
        self.name = name
        self.out: Path = given.out
        self.device = torch.device(given.device)
        self.tiny: bool = given.tiny
        self.deadline = time.monotonic() + given.seconds
        self.rows: list[Row] = []
        if given.resume and self.out.exists():
            self.rows = json.loads(self.out.read_text())["rows"]

    def has(self, labels: Row) -> bool:
        return any(labels.items() <= row.items() for row in self.rows)

    def left(self) -> float:
        """Seconds until the part's limit."""
        return self.deadline - time.monotonic()

    def measure(self, labels: Row, run: Callable[[], Row], seconds: float = 600) -> None:
        """Add the row `labels | run()`, or the reason why there is none."""
        if self.has(labels):
            return
        row = labels | {"failed": STARTED}
        self.rows.append(row)
        self.write()
        started = time.monotonic()
        row |= self._answer(run, min(seconds, self.left()))
        if row["failed"] is None:
            del row["failed"]
        row["seconds"] = round(time.monotonic() - started, 2)
        self.write()
        print(json.dumps(row), flush=True)
        if "failed" in row and is_lost(self.device):
            sys.exit(LOST)

    def _answer(self, run: Callable[[], Row], seconds: float) -> Row:
        if seconds <= 0:
            return {"failed": LATE}
        try:
            with limited(seconds):
                return {"failed": None} | run()
        except Exception as error:  # the next row may still run
            traceback.print_exc()
            return {"failed": f"{type(error).__name__}: {error}"[:500]}

    def write(self) -> None:
        """Write a new file, then rename it."""
        content = {"part": self.name, "tiny": self.tiny, "machine": machine(self.device)}
        fresh = self.out.with_suffix(".new")
        fresh.write_text(json.dumps(content | {"rows": self.rows}, indent=1) + "\n")
        fresh.replace(self.out)

    def code(self) -> int:
        """The exit code of the part."""
        return FAILED if any("failed" in row for row in self.rows) else PASSED


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise TimeOver after so many seconds; end the process where Python gets no turn to raise."""

    def over(number: int, frame: object) -> None:
        raise TimeOver(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def is_lost(device: torch.device) -> bool:
    """Whether the card does not answer any more, for example after an illegal access."""
    if device.type != "cuda":
        return False
    try:
        torch.zeros(1, device=device).add(1).item()
    except Exception:  # torch has several kinds of errors for this
        return True
    return False


def machine(device: torch.device) -> Row:
    facts = {"device": str(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        facts["card"] = torch.cuda.get_device_name(device)
    return facts


def compute_alike() -> None:
    """Let torch choose the same algorithms at each run, and float32 products without TF32.

    An operator that has no such algorithm warns, and the log holds the warning.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """The median time of a call; the caller has warmed it up."""
    times: list[float] = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    difference = found.double().cpu() - expected.double().cpu()
    return float(difference.norm() / expected.double().cpu().norm())
