"""The race: each shape of a layer runs on every engine that is exact there; the faster one wins.

The times are kept in a file in the user's cache folder, one for each CPU, torch and build of the
native library. The file only saves time: without it, every process races again.
"""

import hashlib
import json
import math
import os
import platform
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import torch

from lowtide.kernels import native_library

NATIVE = "native"
ONEDNN = "onednn"
PLAIN = "plain"
ENGINES = (NATIVE, ONEDNN, PLAIN)
SECONDS = 0.01  # of one race
ROUNDS = 2  # that a race has at least
# Best times of one shape differ by 2 to 3 % between two races on a busy machine. A native call also
# saves a step of torch, so it keeps what is not clearly lost.
NOISE = 1.03
# With fewer than 8 bits, oneDNN holds int8, at 4 bits twice the memory. Unpacking 4 bits costs the
# native kernels 2 to 3 % at 256 pixels or more, 9 % at 64 and a third at 16. Within a tenth they
# lose to the unpacking alone, which is what the smaller weight costs; beyond it oneDNN's product
# itself is faster, as with AMX, or the layer is so small that it takes little memory.
MARGIN = 1.1


@dataclass(frozen=True)
class Times:
    """The best time of each engine, in microseconds."""

    native: float
    onednn: float

    def winner(self, *, keeps_bits: bool) -> str:
        """`keeps_bits`: whether the native kernels hold the weight in fewer than 8 bits."""
        margin = MARGIN if keeps_bits else NOISE
        return ONEDNN if self.native > margin * self.onednn else NATIVE

    def reason(self, winner: str) -> str:
        """How the winner compares with the other engine."""
        ratio = self.native / self.onednn if winner == ONEDNN else self.onednn / self.native
        if ratio >= 1:
            return f"{ratio:.1f} x as fast in the race"
        return f"oneDNN won the race by {100 * (1 / ratio - 1):.0f} % only"


def best_times(
    native: Callable[[], None],
    onednn: Callable[[], None],
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Times:
    """Run both in turns, after one run each that does not count; the best time of each."""
    best = [math.inf, math.inf]
    engines = (native, onednn)
    for engine in engines:
        engine()
    start = clock()
    rounds = 0
    while rounds < ROUNDS or clock() - start < seconds:
        for index, engine in enumerate(engines):
            before = clock()
            engine()
            best[index] = min(best[index], clock() - before)
        rounds += 1
    return Times(*(round(1e6 * each, 1) for each in best))


@dataclass
class Races:
    """The times of all races on this machine, by shape, and the file that keeps them."""

    path: Path
    machine: dict[str, str]
    known: dict[str, Times] = field(default_factory=dict)
    changed: bool = False

    def add(self, shape: str, times: Times) -> None:
        self.known[shape] = times
        self.changed = True

    def save(self) -> None:
        """Write the file if there is news; a folder that refuses it costs one sentence."""
        if not self.changed:
            return
        self.changed = False
        # Another process may have raced other shapes in the meantime.
        merged = _read(self.path, self.machine) | self.known
        times = {shape: asdict(each) for shape, each in sorted(merged.items())}
        text = json.dumps({"machine": self.machine, "times": times}, indent=1)
        try:
            _write_at_once(self.path, text)
        except OSError as error:
            _tell(f"lowtide cannot keep the times of its kernels in {self.path} ({error.strerror})")


def saved_races() -> Races:
    """What is known of this machine; nothing if the file is missing, broken or of another one."""
    machine = this_machine()
    name = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    path = cache_folder() / f"kernels-{name}.json"
    return Races(path, machine, _read(path, machine))


def cache_folder() -> Path:
    given = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(given) if given else Path.home() / ".cache"
    return folder / "lowtide"


def this_machine() -> dict[str, str]:
    """What the times depend on."""
    return {"cpu": _cpu_model(), "torch": torch.__version__, "library": _library_build()}


@cache
def _cpu_model() -> str:
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = [line.partition(":") for line in lines]
        parts = ("model name", "stepping", "flags", "Features", "CPU part")
        known = {name.strip(): value.strip() for name, _, value in reversed(fields)}
        if known:
            text = "; ".join(known[part] for part in parts if part in known)
            digest = hashlib.sha256(text.encode()).hexdigest()[:8]
            return f"{known.get('model name', platform.machine())} {digest}"
    return platform.processor() or platform.machine()


def _library_build() -> str:
    library = native_library.native().library
    if library is None:
        return "none"
    return hashlib.sha256(Path(library._name).read_bytes()).hexdigest()[:16]


def _read(path: Path, machine: dict[str, str]) -> dict[str, Times]:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        _tell(f"lowtide cannot read {path} and times its kernels again ({error})")
        return {}
    try:
        if content["machine"] != machine:
            return {}
        return {shape: _times(each) for shape, each in content["times"].items()}
    except (KeyError, TypeError, AttributeError, ValueError):
        _tell(f"lowtide finds no times in {path} and times its kernels again")
        return {}


def _times(content: Mapping[str, float]) -> Times:
    times = Times(float(content["native"]), float(content["onednn"]))
    if not 0 < times.native < math.inf or not 0 < times.onednn < math.inf:
        raise ValueError(times)
    return times


def _write_at_once(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _tell(sentence: str) -> None:
    warnings.warn(f"{sentence}.", stacklevel=2)
