"""What torchrun tells each process that it starts. This module imports nothing heavy."""

import os
from dataclasses import dataclass

# torchrun's own names, which other launchers of torch programs use as well.
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """The number of this process among all, its number on this machine, and how many there are."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def first(self) -> bool:
        return self.rank == 0


def launched() -> Launch:
    """How this process was started; one process without torchrun is the first of one."""
    if any(name not in os.environ for name in NAMES):
        return Launch()
    rank, local_rank, size = (int(os.environ[name]) for name in NAMES[:3])
    return Launch(rank, local_rank, size) if size > 1 else Launch()
