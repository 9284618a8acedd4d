"""The highest memory of this process while a block runs, above where it stood before.

A watcher looks 250 times a second and misses what is shorter, on a busy machine more of it. The kernel's own high-water mark,
which can be set back on Linux, misses nothing but counts mapped files too; less the most of these that the watcher saw, it is a
floor. The peak is the greater of the two.
"""

import ctypes
import gc
import re
import resource
import sys
import threading
from pathlib import Path

STATUS, STATM, RESET = (Path("/proc/self") / name for name in ("status", "statm", "clear_refs"))
EVERY = 0.004
TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def give_back() -> None:
    """Hand freed heap pages back to the system. Aligned tensors of one size leave holes that the next just misses, and
    without this the heap grows by the size of everything that was spilled (measured: 200 MB for 200 MB).
    """
    if TRIM is not None:
        TRIM(0)


def memory() -> tuple[int, int]:
    """Bytes that belong to this process alone, and those of files mapped into it or shared, such as a tape on disk.

    Elsewhere than on Linux the first is the process's high-water mark, the second unknown.
    """
    if STATM.exists():
        _, resident, shared, *_ = (
            resource.getpagesize() * int(pages) for pages in STATM.read_text().split()
        )
        return resident - shared, shared
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    ), 0


def high_water() -> int:
    """The most that was ever resident since the mark was set back, files and all."""
    found = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())
    return 1024 * int(found[1]) if found else 0


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
        # What was freed before and not handed back would hide as much of what is taken now.
        gc.collect()
        give_back()
        self.marked = forget_high_water()
        self.highest, self.files = memory()
        self.start = self.highest
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(EVERY):
            self.look()

    def look(self) -> None:
        own, files = memory()
        self.highest, self.files = max(self.highest, own), max(self.files, files)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self.look()
        if self.marked:
            self.highest = max(self.highest, high_water() - self.files)

    @property
    def above(self) -> int:
        return self.highest - self.start
