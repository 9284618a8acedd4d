"""How long tfmq W4A8 learns the blocks of SD 1.5 at the papers' 20,000 iterations, by measurement.

    PYTHONPATH=.:bench python -m gpu.minutes --out minutes.json

An iteration of one block of each kind is timed, in the loop that the method runs, on random calls.
A kind is a class of blocks with the same shapes of weights and inputs. `minutes` is the time of all
blocks of the kind; the last row adds them up. TIAR, FitRanges and the streams are not in it.
"""

import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator

import torch
from gpu.networks import job_of, network
from gpu.part import Row, Sheet, options, synchronize

from lowtide.methods.tfmq import FSC
from lowtide.nn.rounding import RoundingOptimizer
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.reconstruct import PAPER_ITERS, PENALTY, SHARP_FIRST, Learner, rate
from lowtide.stages.stream import Stream, UnitData
from lowtide.stages.tape import Tape

WARM_UP = 3
TIMED = 12
SLOWEST = 15  # seconds for one kind


def kind_of(data: UnitData, job: Job) -> str:
    """The class of a block, and the shapes of its weights and inputs."""
    layers = [job.model.get_submodule(name) for name in data.unit.layers]
    weights = [tuple(layer.weight.shape) for layer in layers]
    inputs = [
        tuple(value[0].shape[1:]) for value in data.inputs.values() if isinstance(value, Tape)
    ]
    return f"{type(data.module).__name__} {inputs} {weights}"


def seconds_of(learner: Learner, data: UnitData, iterations: int) -> Iterator[float]:
    """The time of each iteration, as Learner.minimise runs them."""
    generator = learner.job.generator("minutes", data.unit.name)
    layers = learner.layers.values()
    roundings = RoundingOptimizer([layer.start_rounding() for layer in layers], rate(PAPER_ITERS))
    device = learner.job.device
    for _ in range(iterations):
        synchronize(device)
        started = time.perf_counter()
        learner.iterate(lambda: data.loss(generator), roundings, PENALTY, SHARP_FIRST).item()
        synchronize(device)
        yield time.perf_counter() - started
    for layer in layers:
        layer.finish_rounding()


def timed(data: UnitData, job: Job, iterations: int) -> Row:
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    learner = Learner(job, "minutes", data.unit, PAPER_ITERS)
    if not learner.layers:
        return {"skipped": "no layer of it is rounded"}
    times = list(seconds_of(learner, data, WARM_UP + iterations))[WARM_UP:]
    row: Row = {"iteration_ms": 1e3 * statistics.median(times)}
    if job.device.type == "cuda":
        row["peak_mb"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return row


def started(sheet: Sheet) -> Job:
    """A job of tfmq that stands before Reconstruct; two calls of eight samples, or of two."""
    model = network("sd15", sheet.device, torch.float32, tiny=sheet.tiny)
    settings = Settings(weights=4, inputs=8, iters=PAPER_ITERS, batch=4 if sheet.tiny else 16)
    job = job_of(model, settings, calls=2, batch=2 if sheet.tiny else 8)
    for stage in (Assign(), FSC(), FitWeights("minmax")):
        stage.run(job)
    return job


def total(sheet: Sheet, counted: Counter[str], planned: int) -> Row:
    """Hours of all blocks, which needs the time of each kind."""
    kinds = [row for row in sheet.rows if "iteration_ms" in row]
    for row in kinds:
        row["blocks"] = counted[row["kind"]]
        row["minutes"] = row["iteration_ms"] * PAPER_ITERS * row["blocks"] / 60_000
    covered = sum(row["blocks"] for row in kinds)
    row: Row = {"blocks": covered, "minutes": sum(row["minutes"] for row in kinds)}
    row["hours"] = row["minutes"] / 60
    return row | ({} if covered == planned else {"failed": f"{planned} blocks, not all timed"})


def main(arguments: list[str] | None = None) -> int:
    """PASSED if every kind of block was timed."""
    sheet = Sheet("minutes", options(__doc__.splitlines()[0], arguments, 50))
    job = started(sheet)
    counted: Counter[str] = Counter()
    stream = Stream(job)
    for data in stream.walk():
        kind = kind_of(data, job)
        counted[kind] += 1
        if counted[kind] == 1:
            labels = {"kind": kind, "block": data.unit.name}
            iterations = 2 if sheet.tiny else TIMED
            run = lambda each=data, count=iterations: timed(each, job, count)  # noqa: E731
            sheet.measure(labels, run, SLOWEST)
    sheet.measure({"kind": "all", "block": "all"}, lambda: total(sheet, counted, len(stream.units)))
    return sheet.code()


if __name__ == "__main__":
    sys.exit(main())
