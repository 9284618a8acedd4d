"""One peer at work: each recipe at each number of bits in a process of its own, its result in one JSON file.

python -m peers.work PEER --home FOLDER ...        (bench/peers.py starts it, first with `float`)
"""

import argparse
import copy
import gc
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import time
import traceback
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide import sampling
from lowtide.checkpoint.facts import fingerprint
from lowtide.evaluation.metrics.pairs import psnr
from peers.cells import BATCH
from peers.task import FLOAT, Bits, Held, Packed, Recipe, Task

LONGEST_REASON = 160
PATH = re.compile(r"(?:/[\w.+-]+)+/([\w.+-]+)")


def shortened(message: str) -> str:
    """One line, with no path of a machine."""
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    return PATH.sub(r"\1", " ".join(lines[:2]))[:LONGEST_REASON]


def images(task: Task, seeds: int, path: Path) -> np.ndarray:
    drawn = sampling.images(task.pipe, task.request(range(seeds)))
    np.save(path, drawn)
    return drawn


def one_call(model: torch.nn.Module, call: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Seconds on the clock and seconds of processor time."""
    clock, processor = time.perf_counter(), time.process_time()
    with torch.no_grad():
        model(**call)
    return time.perf_counter() - clock, time.process_time() - processor


def timed(
    models: list[torch.nn.Module], call: dict[str, torch.Tensor], rounds: int
) -> list[dict[str, float]]:
    """Medians for each model over rounds in which each is called once, so that whatever else runs slows all alike."""
    for model in models:
        one_call(model, call)
    gc.collect()
    runs = [[one_call(model, call) for model in models] for _ in range(rounds)]
    medians = [
        [statistics.median(column) for column in zip(*own, strict=True)]
        for own in zip(*runs, strict=True)
    ]
    return [{"seconds": seconds, "processor_seconds": processor} for seconds, processor in medians]


def by_bits(task: Task, bits: dict[str, int]) -> dict[int, float]:
    """The share of the weights that lies in layers of each number of bits."""
    whole = sum(task.weights.values())
    return {
        kind: sum(task.weights[name] for name in bits if bits[name] == kind) / whole
        for kind in sorted(set(bits.values()))
    }


def shares(task: Task, held: dict[str, Held]) -> dict[str, Any]:
    """How much of all weights is stored at how many bits, how much meets rounded inputs, and which layers stay in float."""
    of = {name: held.get(name, Held(FLOAT)) for name in task.weights}
    share = {
        "weights": by_bits(task, {name: layer.weights for name, layer in of.items()}),
        "inputs": by_bits(task, {name: layer.inputs for name, layer in of.items()}),
    }
    left = [name for name, layer in of.items() if layer.weights >= 16]
    unrounded = [name for name, layer in of.items() if layer.inputs >= 16]
    return {"layers": len(of), "share": share, "left": left, "left_inputs": unrounded}


def on_disk(packed: Packed, folder: Path) -> dict[str, Any]:
    """Bytes of everything its own format writes for the denoiser."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        packed.save(folder)
    except Exception as error:
        return {"bytes": None, "save": f"{type(error).__name__}: {shortened(error)}"}
    return {"bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())}


def measured(task: Task, packed: Packed, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    reference = np.load(given.home / "float" / "images.npy")
    drawn = images(task, len(reference), out / "images.npy")
    floating = sampling.denoiser(sampling.load_pipeline(task.source)).eval()
    theirs, ours = timed([packed.model, floating], task.calls[0], given.rounds)
    speed = {"batch": BATCH, "seconds_per_step": theirs, "float_seconds_per_step": ours}
    return {
        "psnr": psnr(drawn, reference),
        "finite": bool(np.isfinite(drawn).all()),
        "note": packed.note,
    } | speed


def run(task: Task, recipe: Recipe, given: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One cell."""
    started = time.perf_counter()
    packed = recipe.run(task)
    seconds = time.perf_counter() - started
    found = shares(task, packed.held) | on_disk(packed, out / "saved")
    return {"quantize_seconds": seconds} | found | measured(task, packed, given, out)


def run_and_write(task: Task, recipe: Recipe, given: argparse.Namespace, out: Path) -> None:
    """In the process of the cell: what it prints goes to its own log, what goes wrong is its result."""
    os.setsid()
    # Its own cache: a compiler that is killed leaves half a library, which another cell would load.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out / "compiled")
    with (out / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.manual_seed(0)
    try:
        found = run(task, recipe, given, out)
    except Exception as error:
        found = {"cannot": f"{type(error).__name__}: {shortened(error)}"}
        traceback.print_exc()
    write(out, found)


def write(out: Path, found: dict[str, Any]) -> None:
    (out / "result.json").write_text(json.dumps(found, indent=1))


def done(out: Path) -> bool:
    """Only what went well is kept: a failure deserves another try."""
    kept = out / "result.json"
    return kept.exists() and "cannot" not in json.loads(kept.read_text())


def cell(task: Task, recipe: Recipe, given: argparse.Namespace, out: Path) -> None:
    """A process forked from this one, which has imported and recorded what all cells need; it may crash or hang."""
    (out / "result.json").unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(
        target=run_and_write, args=(task, recipe, given, out)
    )
    child.start()
    try:
        child.join(60 * given.minutes)
        late = child.is_alive()
    finally:
        end(child)
    if not (out / "result.json").exists():
        write(
            out,
            {
                "cannot": f"not done in {given.minutes} minutes"
                if late
                else f"crashed, exit code {child.exitcode}"
            },
        )
    for scratch in ("saved", "compiled"):
        shutil.rmtree(out / scratch, ignore_errors=True)


def end(child: multiprocessing.Process) -> None:
    """With the compilers that it started: it leads a session of its own, which an interrupt from the keyboard does not reach."""
    if child.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def peer(given: argparse.Namespace, task: Task) -> None:
    """Every recipe at all bits it is meant for, and a list of what was done."""
    module = importlib.import_module(f"peers.{given.peer}")
    task.calls = torch.load(given.home / "float" / "calls.pt")
    task.weights  # noqa: B018  loads the model before it forks, and before a recipe puts another in its place
    place, listed = given.home / given.peer, []
    for bits in given.bits.split(","):
        for name, recipe in module.RECIPES.items():
            own = copy.copy(task)
            own.bits = Bits.read(bits)
            if recipe.serves(own.bits) and name in (given.recipes or module.RECIPES):
                out = place / bits / "".join(letter if letter.isalnum() else "-" for letter in name)
                out.mkdir(parents=True, exist_ok=True)
                listed.append(
                    {"bits": bits, "recipe": name, "folder": out.relative_to(given.home).as_posix()}
                )
                print(f"{given.peer} {bits} {name}", flush=True)
                done(out) or cell(own, recipe, given, out)
    write(place, {"versions": {name: version(name) for name in module.PACKAGES}, "cells": listed})


def floating(given: argparse.Namespace, task: Task) -> None:
    """The float model's images, its calibration calls, and a copy of it for all: a zoo model may be in training meanwhile."""
    place = given.home / "float"
    task.pipe.save_pretrained(place / "model")
    torch.save(task.calls, place / "calls.pt")
    images(task, given.seeds, place / "images.npy")
    size = on_disk(Packed(task.model, {}, task.model.save_pretrained), place / "saved")
    shutil.rmtree(place / "saved")
    convolved = sum(
        task.weights[name]
        for name in task.weights
        if isinstance(task.adapter.all_layers[name], torch.nn.Conv2d)
    )
    ends, weights = sum(task.weights[name] for name in task.ends), sum(task.weights.values())
    whole = {
        "layers": len(task.weights),
        "weights": weights,
        "in_convolutions": convolved,
        "in_ends": ends,
    }
    write(place, size | whole | {"fingerprint": fingerprint(task.model)})


def conditions(text: str) -> dict[str, Any]:
    """Fields of a request; JSON knows no tuples."""
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", help="a module of this package, or float: that comes first")
    parser.add_argument("--model")
    parser.add_argument("--home", type=Path)
    parser.add_argument("--bits")
    parser.add_argument("--conditions", type=conditions)
    parser.add_argument(
        "--recipes", type=json.loads, default=[], help="JSON list of names; none: all"
    )
    for name in ("steps", "images", "seeds", "iters", "rounds", "minutes"):
        parser.add_argument(f"--{name}", type=int)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    # As an exit, so that what is running is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (given.home / given.peer).mkdir(parents=True, exist_ok=True)
    task = Task(given.model, Bits(8, 8), given.steps, given.images, given.iters, given.conditions)
    try:
        (floating if given.peer == "float" else peer)(given, task)
    except Exception as error:
        write(given.home / given.peer, {"cannot": f"{type(error).__name__}: {shortened(error)}"})
        traceback.print_exc()


if __name__ == "__main__":
    main()
