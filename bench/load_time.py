"""The share of verification in the time that a packed model takes until it is ready to run.

    python bench/load_time.py FOLDER [--runs 7]

FOLDER holds a packed UNet2DConditionModel, such as bench/rehearse.py writes (sd15: 0.43 GB). It is
ready once its codes are in the order of the kernels. Loads with all hashes, without those of the
tensors, and without any take turns; the file is in the page cache. The table has the least of all
runs, and processor seconds beside seconds, because those of a busy machine wander.
"""

import argparse
import time
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from lowtide.checkpoint.file_format import verifying
from lowtide.nn.swap import packed_layers

AMOUNTS = ("full", "fast", "off")


def loaded(folder: Path, amount: str) -> tuple[float, float]:
    """Seconds and processor seconds of one load."""
    clock = time.perf_counter()
    processor = time.process_time()
    with verifying(amount):  # pyright: ignore[reportArgumentType]
        model = UNet2DConditionModel.from_pretrained(folder)
    for _, layer in packed_layers(model):
        layer.hold_panels()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {amount: [] for amount in AMOUNTS}
    for number in range(arguments.runs + 1):
        for amount in AMOUNTS:
            found = loaded(arguments.folder, amount)
            if number:  # the first of each warms the page cache
                times[amount].append(found)
    print(f"{torch.get_num_threads()} threads, {arguments.runs} runs")
    rows = {
        amount: [min(column) for column in zip(*each, strict=True)]
        for amount, each in times.items()
    }
    for amount, (clock, processor) in rows.items():
        share = 100 * (1 - rows["off"][1] / processor)
        print(f"{amount:5} {clock:6.2f} s  {processor:6.2f} s of a processor, {share:4.1f} % more")


if __name__ == "__main__":
    main()
