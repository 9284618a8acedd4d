"""How near a packed model stays to its float model on schedules that it was not calibrated for.

    python bench/schedules.py [--models zoo:digits] [--anew ddim:8,euler:8]

Each model is quantized once by `best` at W4A8 for 20 steps of DDIM (16 calibration images, 100
iterations). It then draws 16 images with each sampler and number of steps, and so does the float
model: the same seeds, the same sampler. The table has the PSNR and the relative L2 between the two:
of the model as it is, which adds steps as they come; after `reschedule`; and, for the schedules in
--anew, of a model that was quantized for this very schedule.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import lowtide
from lowtide import sampling
from lowtide.evaluation.metrics.pairs import psnr
from lowtide.settings import Request

SAMPLERS = ("ddim", "dpmsolver++", "unipc", "euler", "lcm")
STEPS = (8, 20, 50)
CALIBRATION: dict[str, Any] = {
    "weights": 4,
    "inputs": 8,
    "images": 16,
    "calibration_steps": 10,
    "iters": 100,
}
CONDITIONS: dict[str, dict[str, Any]] = {
    "zoo:emoji": {"prompts": ("cat face", "rocket", "red apple", "crown"), "guidance": 4.0},
    "zoo:digits-cond": {"labels": range(10), "guidance": 2.0},
}
HEAD = ("at once", "after reschedule", "quantized anew")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--models", default="zoo:digits")
    options.add_argument("--anew", default="", help="SAMPLER:STEPS,...")
    chosen = options.parse_args()
    for name in chosen.models.split(","):
        with tempfile.TemporaryDirectory() as home:
            print_table(name, Path(home), chosen.anew.split(","))


def print_table(name: str, home: Path, anew: list[str]) -> None:
    """A row for each sampler and number of steps."""
    folder = quantized(name, "ddim", 20).save(home / "packed")
    print(f"\n`{name}`\n")
    print(f"| sampler | steps | {' | '.join(HEAD)} |")
    print("|---" * (2 + len(HEAD)) + "|", flush=True)
    for sampler in SAMPLERS:
        for steps in STEPS:
            request = Request(
                steps=steps, seeds=range(16), scheduler=sampler, **CONDITIONS.get(name, {})
            )
            floating = sampling.images(lowtide.load(name), request)
            drawn = [at_once(folder, request), rescheduled(folder, request)]
            if f"{sampler}:{steps}" in anew:
                drawn.append(sampling.images(quantized(name, sampler, steps).pipe, request))
            cells = [near(images, floating) for images in drawn]
            cells += [""] * (len(HEAD) - len(cells))
            print(f"| {sampler} | {steps} | {' | '.join(cells)} |", flush=True)


def quantized(name: str, sampler: str, steps: int) -> lowtide.Quantized:
    conditions = CONDITIONS.get(name, {})
    return lowtide.quantize(name, scheduler=sampler, steps=steps, **CALIBRATION, **conditions)


def at_once(folder: Path, request: Request) -> np.ndarray:
    return sampling.images(lowtide.load(folder), request)


def rescheduled(folder: Path, request: Request) -> np.ndarray:
    """Images of a model whose own schedule is now that of the request."""
    pipe = sampling.scheduled(lowtide.load(folder), request.scheduler, None)
    lowtide.reschedule(pipe, request.steps)
    return sampling.images(pipe, request)


def near(images: np.ndarray, floating: np.ndarray) -> str:
    """PSNR in dB and relative L2."""
    error = np.linalg.norm(images - floating) / np.linalg.norm(floating)
    return f"{psnr(images, floating):.1f} dB, {error:.3f}"


if __name__ == "__main__":
    main()
