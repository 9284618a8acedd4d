"""The highest memory of this process while a block runs, above where it stood before.

A watcher looks fifty times a second and misses what is shorter, on a busy machine more of it; the kernel's own high-water mark,
which can be set back on Linux, misses nothing, but counts files too. The peak is the greater of the two, files left out.
"""

import gc
import re
import resource
import sys
import threading
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
EVERY = 0.02


def status() -> dict[str, int]:
    """What Linux tells of this process's memory, in bytes; nothing elsewhere."""
    told = STATUS.read_text() if STATUS.exists() else ""
    return {name: 1024 * int(number) for name, number in re.findall(r"(\w+):\s+(\d+) kB", told)}


def own_memory() -> int:
    """Bytes that belong to this process alone, without files mapped into it; elsewhere than on Linux, its high-water mark."""
    found = status().get("RssAnon")
    if found is not None:
        return found
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_high_water() -> bool:
    """Set the kernel's mark back to what is there now, where it lets us."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


class Peak:
    """`with Peak() as peak: ...`, then `peak.above`."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.marked = forget_high_water()
        self.start = self.highest = own_memory()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(EVERY):
            self.highest = max(self.highest, own_memory())

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self.highest = max(self.highest, own_memory(), self.high_water())

    def high_water(self) -> int:
        """The kernel's mark without the files; 0 where it keeps none."""
        found = status()
        known = self.marked and {"VmHWM", "RssFile", "RssShmem"} <= set(found)
        return found["VmHWM"] - found["RssFile"] - found["RssShmem"] if known else 0

    @property
    def above(self) -> int:
        return self.highest - self.start
