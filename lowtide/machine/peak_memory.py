"""The peak memory of this process while a block runs, above its memory at the start of the block.

Two measurements are combined, and the peak is the greater of the two:

- A thread reads the memory 250 times a second. It misses peaks that are shorter than its interval,
  and more of them on a busy machine.
- On Linux, the kernel keeps a high-water mark that can be reset. It misses nothing, but it also
  counts mapped files. The mark minus the most mapped memory that the thread saw is a lower bound.
"""

import ctypes
import gc
import re
import resource
import sys
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
STATM = Path("/proc/self/statm")
RESET = Path("/proc/self/clear_refs")
INTERVAL = 0.004  # seconds
MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def release_free_memory() -> None:
    """Return freed heap pages to the system.

    Aligned tensors of one size leave holes in the heap that the next tensor just misses. Without
    this call the heap grows by the size of everything that was spilled to disk (measured: 200 MB
    for 200 MB).
    """
    if MALLOC_TRIM is not None:
        MALLOC_TRIM(0)


def memory() -> tuple[int, int]:
    """Bytes that only this process uses, and bytes of mapped or shared files (a tape on disk).

    On other systems than Linux the first is the high-water mark of the process, and the second is
    unknown and reported as 0.
    """
    if STATM.exists():
        page = resource.getpagesize()
        _, resident, shared, *_ = (page * int(count) for count in STATM.read_text().split())
        return resident - shared, shared
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0


def high_water() -> int:
    """The most bytes that were resident since the last reset, mapped files included."""
    mark = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text())
    return 1024 * int(mark[1]) if mark else 0


def reset_high_water() -> bool:
    """Reset the kernel's mark to the memory of now. False where the system does not allow it."""
    try:
        RESET.write_text("5")
    except OSError:
        return False
    return True


class Peak:
    """`with Peak() as peak: ...`; afterwards `peak.above` is the peak in bytes above the start."""

    def __enter__(self) -> "Peak":
        # Freed memory that the heap still holds would hide an allocation of the same size.
        gc.collect()
        release_free_memory()
        self.has_mark = reset_high_water()
        own, mapped = memory()
        self.start = own
        self.highest = own
        self.most_mapped = mapped
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch, daemon=True)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(INTERVAL):
            self.sample()

    def sample(self) -> None:
        own, mapped = memory()
        self.highest = max(self.highest, own)
        self.most_mapped = max(self.most_mapped, mapped)

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self.sample()
        if self.has_mark:
            self.highest = max(self.highest, high_water() - self.most_mapped)

    @property
    def above(self) -> int:
        return self.highest - self.start
