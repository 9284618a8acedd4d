"""The images of the calibration set that nothing learns from, and that judge what was learnt.

They are the last eighth of the images, at all their steps and guidance branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.stages.base import Job
from lowtide.stages.call import Call
from lowtide.stages.collect import calibration_request

HELD_OUT = 8  # one image in so many is held out


@dataclass(frozen=True)
class HeldOut:
    """Which samples of the calibration calls show images that are held out.

    images: of the calibration set, and `batch` of them in a call. calls: those of one batch. rows:
    samples of a call: its guidance branches follow each other, each with all its images.
    """

    images: int
    batch: int
    calls: int
    rows: int

    @property
    def count(self) -> int:
        """The number of held-out images: an eighth of all, so none where there are fewer than 8."""
        return self.images // HELD_OUT

    def image(self, call: int, row: int) -> int:
        """The number of the image that a sample shows."""
        return call // self.calls * self.batch + row % self.batch

    def split(self) -> tuple[list[int], list[int]]:
        """The samples to learn from and those that are held out, by number: call times rows + row.

        Where no image is held out, all samples serve both.
        """
        samples = range(self.images // self.batch * self.calls * self.rows)
        first = self.images - self.count
        held = [number for number in samples if self.image(*divmod(number, self.rows)) >= first]
        learnt = [number for number in samples if self.image(*divmod(number, self.rows)) < first]
        return learnt, held or learnt


def split_of(job: Job, calls: Sequence[Call]) -> tuple[list[int], list[int]]:
    """The samples of these calls to learn from and those that judge. One line says if none is held.

    calls: those of some steps, batch by batch.
    """
    request = calibration_request(job)
    images = len(request.seeds)
    of_batch = len(calls) // (images // request.batch)
    held = HeldOut(images, request.batch, of_batch, len(calls[0].arguments["timestep"]))
    if not held.count and not job.report.get("held_out_told"):
        job.report["held_out_told"] = True
        few = f"{images} calibration images are too few to hold any out (at least {HELD_OUT})"
        job.say(f"{few}: blocks are judged on the images that they learn from")
    return held.split()
