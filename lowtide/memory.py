"""The highest memory of this process while a block runs, above where it stood before."""

import gc
import re
import resource
import sys
import threading
from pathlib import Path

STATUS = Path("/proc/self/status")
EVERY = 0.02


def own_memory() -> int:
    """Bytes that belong to this process alone, without files mapped into it; elsewhere than on Linux, its high-water mark."""
    found = re.search(r"RssAnon:\s+(\d+)", STATUS.read_text()) if STATUS.exists() else None
    if found:
        return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Peak:
    """`with Peak() as peak: ...`, then `peak.above`."""

    def __enter__(self) -> "Peak":
        gc.collect()
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
        self.highest = max(self.highest, own_memory())

    @property
    def above(self) -> int:
        return self.highest - self.start
