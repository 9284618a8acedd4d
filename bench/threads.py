"""How much faster a packed model runs on two threads than on one, on an idle machine.

    python bench/threads.py [FOLDER ...] [--batch 8]

The wall time of a step, the medians of 15 in turns. Without folders: the models that
bench/speed_models.py keeps.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from speed_models import packed_folder

from lowtide import sampling
from lowtide.workflows.speed_bench.variant import recorded_calls

REPEATS = 15
THREADS = (1, 2)


@torch.no_grad()
def medians(folder: str, batch: int) -> list[float]:
    """The median seconds of a step, by number of threads."""
    pipe = sampling.load_pipeline(folder)
    model = sampling.denoiser(pipe)
    [call] = recorded_calls(pipe, {"model": folder, "batch": batch, "most": 1})
    arguments = {
        name: torch.from_numpy(each) if isinstance(each, np.ndarray) else each
        for name, each in call.items()
    }
    times: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for turn in range(REPEATS + 1):
        for threads in THREADS:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            model(**arguments)
            if turn:  # the first prepares
                times[threads].append(time.perf_counter() - started)
    return [statistics.median(times[threads]) for threads in THREADS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    folders: list[str | Path] = options.folders
    for folder in folders or [packed_folder(name, "w8a8") for name in ("ddpm", "dit")]:
        one, two = medians(str(folder), options.batch)
        print(f"{folder}: one thread {1e3 * one:.1f} ms, two {1e3 * two:.1f} ms, {one / two:.2f} x")


if __name__ == "__main__":
    main()
