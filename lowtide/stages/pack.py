"""Pack: codes at their true bits take the place of the simulation."""

from dataclasses import dataclass

from lowtide.nn.swap import pack_modules
from lowtide.stages.base import Job


@dataclass(frozen=True)
class Pack:
    """Replace every quantized layer by its packed twin; outputs stay the same bit for bit."""

    def run(self, job: Job) -> None:
        pack_modules(job.model)
        job.calls = []
