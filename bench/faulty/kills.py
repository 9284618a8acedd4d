"""SIGKILL of commands: at random instants, and at every file-system event of an overwrite.

A command runs in a fork of this process, which has imported everything, so that a kill costs
seconds. What a killed command leaves has to be the old result or the new one, or one that the next
command puts back; and the next command has to give the bytes of a run that nobody killed.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Times and costs of a run differ between runs, and with them the hash of their file in the list.
# A lock stays for a moment after the new result stands.
# Files that hold times, paths or hashes of the others: two equal results differ in them.
NOT_COMPARED = ("lowtide.json", "lowtide-files.json", "sampling.json", ".lowtide-lock")
WATCHED = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "shutil.rmtree")
# What a place may hold after a kill and before the next command.
LEFT = ("old", "new", "vacant")


@dataclass(frozen=True)
class Kill:
    """One kill. `left`: what stood at the place; `ended`: what the next command made of it."""

    command: str
    when: str
    left: str
    ended: str


Command = Callable[[Path], None]


def forked(act: Callable[[], object], seconds: float | None = None) -> int:
    """The exit status of `act` in a fork; negative if it was killed, after so many seconds."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            act()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            os._exit(status)
    if seconds is not None:
        _kill_after(child, seconds)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_after(child: int, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)


def content(place: Path) -> dict[str, bytes] | None:
    """The bytes of a result; None if there is nothing."""
    if not place.is_dir():
        return None
    paths = [path for path in place.rglob("*") if path.is_file() and path.name not in NOT_COMPARED]
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in paths}


def which(place: Path, old: dict[str, bytes] | None, new: dict[str, bytes]) -> str:
    """What stands at a place."""
    found = content(place)
    if found is None:
        return "vacant"
    if found == new:
        return "new"
    return "old" if found == old else f"a mix of {len(found)} files"


def leftovers(place: Path) -> list[str]:
    """What lies beside a place that should be gone after a command has ended."""
    return [path.name for path in place.parent.iterdir() if path != place]


def _ended(place: Path, status: int, old: dict[str, bytes] | None, new: dict[str, bytes]) -> str:
    if status:
        return f"exit {status}"
    if left := leftovers(place):
        return f"leftovers {left[:3]}"
    return which(place, old, new)


@dataclass(frozen=True)
class Case:
    """A command that writes a place, and what stood there before, if anything."""

    name: str
    command: Command
    before: Path | None


def _prepared(case: Case, room: Path) -> tuple[Path, dict[str, bytes] | None]:
    """An empty room with the place in it, and what stands there."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    place = room / "place"
    if case.before is not None:
        shutil.copytree(case.before, place)
    return place, content(place)


def at_random(cases: Sequence[Case], count: int, room: Path, seed: int = 0) -> Iterator[Kill]:
    """Kill each command at random instants of its time, then run it again."""
    rng = random.Random(seed)
    times: dict[str, float] = {}
    wholes: dict[str, dict[str, bytes]] = {}
    for case in cases:
        place, _ = _prepared(case, room)
        started = time.monotonic()
        status = forked(lambda: case.command(place))  # noqa: B023
        times[case.name] = time.monotonic() - started
        assert status == 0, (case.name, status)
        whole = content(place)
        assert whole is not None
        wholes[case.name] = whole
    for number in range(count):
        case = cases[number % len(cases)]
        place, old = _prepared(case, room)
        when = rng.uniform(0, times[case.name])
        new = wholes[case.name]
        if forked(lambda: case.command(place), when) >= 0:  # noqa: B023
            when = times[case.name]
        left = which(place, old, new)
        status = forked(lambda: case.command(place))  # noqa: B023
        yield Kill(case.name, f"after {when:.2f} s", left, _ended(place, status, old, new))


def at_events(case: Case, room: Path, most: int | None = None) -> Iterator[Kill]:
    """Kill a command before each file-system event at its place, the first, the second, and so on.

    most: not each of them, but so many, evenly spread.
    """
    place, old = _prepared(case, room)
    counted = room.with_name(f"{room.name}-events")
    status = forked(lambda: watched(case, place, None, counted))
    assert status == 0, (case.name, status)
    new = content(place)
    assert new is not None
    events = int(counted.read_text())
    chosen = range(events)
    if most is not None and most < events:
        chosen = sorted({round(each * (events - 1) / (most - 1)) for each in range(most)})
    for event in chosen:
        place, old = _prepared(case, room)
        killed = forked(lambda: watched(case, place, event, counted))  # noqa: B023
        left = which(place, old, new) if killed < 0 else f"exit {killed} without a kill"
        status = forked(lambda: case.command(place))  # noqa: B023
        yield Kill(case.name, f"event {event}", left, _ended(place, status, old, new))


def watched(case: Case, place: Path, last: int | None, counted: Path) -> None:
    """Run a command that kills itself before the event of this number; count them without one."""
    count = 0
    home = os.fsencode(place.parent)

    def at_event(event: str, arguments: tuple) -> None:
        nonlocal count
        if event not in WATCHED or not _is_at(home, event, arguments):
            return
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    _watch_native_calls(at_event)
    sys.addaudithook(at_event)
    case.command(place)
    counted.write_text(str(count))


def _is_at(home: bytes, event: str, arguments: tuple) -> bool:
    """Whether an event changes something in the folder of the place."""
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike) or not os.fsencode(path).startswith(home):
        return False
    if event != "open":
        return True
    mode, flags = arguments[1:3]
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
    return bool(flags & writes) or (isinstance(mode, str) and bool(set(mode) & set("wax+")))


def _watch_native_calls(at_event: Callable[[str, tuple], None]) -> None:
    """Renames and exchanges that Python does not audit: fsync, safetensors, and renameat2."""
    from lowtide.checkpoint import exchange, folders

    exchanged = exchange.exchanged
    fsync = os.fsync

    def exchanging(first: Path, second: Path) -> bool:
        at_event("os.rename", (first,))
        result = exchanged(first, second)
        at_event("os.rename", (first,))
        return result

    def forcing(handle: int) -> None:
        at_event("os.rename", (os.readlink(f"/proc/self/fd/{handle}"),))
        fsync(handle)

    folders.exchanged = exchanging  # pyright: ignore[reportPrivateImportUsage]
    os.fsync = forcing


def is_whole(kill: Kill) -> bool:
    """Old or new at every moment, and the next command gives the whole result."""
    return kill.left in LEFT and kill.ended == "new"
