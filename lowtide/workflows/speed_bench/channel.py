"""How a measurement talks to the process of one variant: a line of JSON for each order and answer.

This module needs the standard library alone, so that a process holds only what its variant needs.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lowtide.errors import BadInput

Answer = dict[str, Any]
STATUS = Path("/proc/self/status")
ROOT = Path(__file__).resolve().parents[3]
LAST_LINE = 300  # characters of it that are shown


class Ended(Exception):
    """A process ended without an answer; the message is the last of what it complained about."""


@dataclass(frozen=True)
class Running:
    """A loaded variant.

    step(call): one step on this call. forget(): what is kept of earlier visits of timesteps is
    gone. orders: what else it can be asked for, by name.
    """

    step: Callable[[int], None]
    forget: Callable[[], None] | None = None
    orders: Mapping[str, Callable[[Answer], Answer]] = field(default_factory=dict)


def serve(load: Callable[[], Running]) -> None:
    """Load a variant and answer orders until the input ends."""
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        before = _memory("VmRSS")
        started = _now()
        running = load()
        _say(answers, {"load": _since(started), "libraries": before})
        for line in sys.stdin:
            _say(answers, _answer(running, json.loads(line)))
    except BadInput as error:
        _say(answers, {"bad": [error.found, error.expected, error.way_out]})


def _answer(running: Running, order: Answer) -> Answer:
    name = order.pop("order")
    if name == "steps":
        return _timed_steps(running, order)
    if name == "memory":
        return {"peak": _memory("VmHWM")}
    return running.orders[name](order)


def _timed_steps(running: Running, order: Answer) -> Answer:
    """Steps one after another, as a sampler takes them.

    warm: a step before them is not timed, because other processes have had the caches. forget: the
    steps are first visits of their timesteps.
    """
    if order["warm"]:
        running.step(order["calls"][0])
    if order["forget"] and running.forget:
        running.forget()
    times: Answer = {"cpu": [], "wall": []}
    for call in order["calls"]:
        started = _now()
        running.step(call)
        for name, each in _since(started).items():
            times[name].append(each)
    return times


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()


def _since(started: tuple[float, float]) -> Answer:
    cpu, wall = _now()
    return {"cpu": cpu - started[0], "wall": wall - started[1]}


def _memory(name: str) -> int:
    """Bytes: VmRSS, what is resident; VmHWM, the most that was. 0 where the system has neither."""
    text = STATUS.read_text() if STATUS.exists() else ""
    lines = [line.split() for line in text.splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(lines[0][1]) if lines else 0


def _say(answers: IO[str], answer: Answer) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def environment(threads: int) -> dict[str, str]:
    """The environment of a process that imports this lowtide, whatever its Python has."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}


def last_line(log: Path) -> str:
    """The last of what a process complained about."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")[:LAST_LINE]


class Variant:
    """The parent's end: a process, its answer to loading, and the orders that it takes."""

    def __init__(self, command: Sequence[str], threads: int, log: Path):
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment(threads),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.loaded = self._read()

    def ask(self, order: str, **options: object) -> Answer:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"order": order} | options) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Ended(self._complaint()) from None
        return self._read()

    def _read(self) -> Answer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            raise Ended(self._complaint())
        answer = json.loads(line)
        if "bad" in answer:
            raise BadInput(*answer["bad"])
        return answer

    def _complaint(self) -> str:
        return f"exit code {self.process.returncode}: {last_line(self.log)}"

    def close(self) -> None:
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@contextmanager
def closing(variants: dict[str, Variant]) -> Iterator[None]:
    """All processes end with the block, whatever happens in it."""
    try:
        yield
    finally:
        for variant in variants.values():
            variant.close()
