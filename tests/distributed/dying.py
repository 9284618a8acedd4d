"""`lowtide` with the arguments of this script, whose second process ends in its third unit."""

import os

import shared_work
import torch

from lowtide import cli
from lowtide.distributed.launch import launched
from lowtide.stages.base import Job

searches = 0
agreed = Job.agreed


def dying(self: Job, stage: str, unit: str, tensors):
    """The second process ends before the third block is finished."""
    global searches
    searches += 1
    if searches == 3 and launched().rank == 1:
        os._exit(9)
    return agreed(self, stage, unit, tensors)


if __name__ == "__main__":
    torch.set_num_threads(1)
    Job.agreed = dying
    with shared_work.quickly():
        cli.main()
