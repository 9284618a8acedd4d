"""`lowtide` with the arguments of this script, whose second process is killed in its third unit.

DIES_AT names another unit; at 0 it lives.
"""

import os
import signal

import shared_work
import torch

from lowtide import cli
from lowtide.distributed.launch import launched
from lowtide.stages.base import Job

DIES_AT = int(os.environ.get("DIES_AT", "3"))
searches = 0
agreed = Job.agreed


def dying(self: Job, stage: str, unit: str, tensors):
    """The second process ends before the block is finished."""
    global searches
    searches += 1
    if searches == DIES_AT and launched().rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return agreed(self, stage, unit, tensors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Job.agreed = dying
    with shared_work.quickly():
        try:
            cli.main()
        finally:
            print(f"{searches} units learnt")
