"""One peer: each recipe at each number of bits in a process of its own, its result as JSON.

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
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from itertools import product
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
    clock = time.perf_counter()
    processor = time.process_time()
    with torch.no_grad():
        model(**call)
    return time.perf_counter() - clock, time.process_time() - processor


def timed(
    models: list[torch.nn.Module], call: dict[str, torch.Tensor], rounds: int
) -> list[dict[str, float]]:
    """Median times of each model. Every round calls each model once.

    Whatever else runs on the machine slows all models alike.
    """
    for model in models:
        one_call(model, call)
    gc.collect()
    runs = [[one_call(model, call) for model in models] for _ in range(rounds)]
    return [medians(own) for own in zip(*runs, strict=True)]


def medians(calls: Iterable[tuple[float, float]]) -> dict[str, float]:
    seconds, processor = zip(*calls, strict=True)
    return {
        "seconds": statistics.median(seconds),
        "processor_seconds": statistics.median(processor),
    }


def by_bits(task: Task, bits: dict[str, int]) -> dict[int, float]:
    """The share of the weights that lies in layers of each number of bits."""
    whole = sum(task.weights.values())
    return {
        kind: sum(task.weights[name] for name in bits if bits[name] == kind) / whole
        for kind in sorted(set(bits.values()))
    }


def shares(task: Task, held: dict[str, Held]) -> dict[str, Any]:
    """The shares of weights stored, and multiplied with inputs, at each number of bits.

    Also the layers whose weights or inputs stay in float.
    """
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


def measured(task: Task, packed: Packed, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    reference = np.load(options.home / "float" / "images.npy")
    drawn = images(task, len(reference), out / "images.npy")
    floating = sampling.denoiser(sampling.load_pipeline(task.source)).eval()
    theirs, ours = timed([packed.model, floating], task.calls[0], options.rounds)
    return {
        "psnr": psnr(drawn, reference),
        "finite": bool(np.isfinite(drawn).all()),
        "note": packed.note,
        "batch": BATCH,
        "seconds_per_step": theirs,
        "float_seconds_per_step": ours,
    }


def run(task: Task, recipe: Recipe, options: argparse.Namespace, out: Path) -> dict[str, Any]:
    """One cell."""
    started = time.perf_counter()
    packed = recipe.run(task)
    seconds = time.perf_counter() - started
    stored = shares(task, packed.held) | on_disk(packed, out / "saved")
    return {"quantize_seconds": seconds} | stored | measured(task, packed, options, out)


def run_and_write(task: Task, recipe: Recipe, options: argparse.Namespace, out: Path) -> None:
    """Run in the cell's process: its output goes to its own log, an error becomes its result."""
    os.setsid()
    # Its own cache: a compiler that is killed leaves half a library, which another cell would load.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(out / "compiled")
    with (out / "log.txt").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.manual_seed(0)
    try:
        result = run(task, recipe, options, out)
    except Exception as error:
        result = {"cannot": f"{type(error).__name__}: {shortened(error)}"}
        traceback.print_exc()
    write(out, result)


def write(out: Path, result: dict[str, Any]) -> None:
    (out / "result.json").write_text(json.dumps(result, indent=1))


def done(out: Path) -> bool:
    """Whether the cell has a result; a failed cell runs again."""
    path = out / "result.json"
    return path.exists() and "cannot" not in json.loads(path.read_text())


def cell(task: Task, recipe: Recipe, options: argparse.Namespace, out: Path) -> None:
    """Run a cell in a fork of this process, which has loaded what all cells need.

    The cell may crash or hang.
    """
    (out / "result.json").unlink(missing_ok=True)
    child = multiprocessing.get_context("fork").Process(
        target=run_and_write, args=(task, recipe, options, out)
    )
    child.start()
    try:
        child.join(60 * options.minutes)
        late = child.is_alive()
    finally:
        end(child)
    if not (out / "result.json").exists():
        crash = f"crashed, exit code {child.exitcode}"
        write(out, {"cannot": f"not done in {options.minutes} minutes" if late else crash})
    for scratch in ("saved", "compiled"):
        shutil.rmtree(out / scratch, ignore_errors=True)


def end(child: multiprocessing.Process) -> None:
    """End the cell's process with the compilers that it started.

    It leads a session of its own, which an interrupt from the keyboard does not reach.
    """
    if child.is_alive():
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def peer(options: argparse.Namespace, task: Task) -> None:
    """Run every recipe at all bits it is meant for; write a list of the cells."""
    module = importlib.import_module(f"peers.{options.peer}")
    task.calls = torch.load(options.home / "float" / "calls.pt")
    # Load the model before a cell forks, and before a recipe replaces it.
    task.weights  # noqa: B018
    place = options.home / options.peer
    cells = []
    for bits, (name, recipe) in product(options.bits.split(","), module.RECIPES.items()):
        own = copy.copy(task)
        own.bits = Bits.read(bits)
        if recipe.serves(own.bits) and name in (options.recipes or module.RECIPES):
            out = place / bits / "".join(letter if letter.isalnum() else "-" for letter in name)
            out.mkdir(parents=True, exist_ok=True)
            folder = out.relative_to(options.home).as_posix()
            cells.append({"bits": bits, "recipe": name, "folder": folder})
            print(f"{options.peer} {bits} {name}", flush=True)
            if not done(out):
                cell(own, recipe, options, out)
    write(place, {"versions": {name: version(name) for name in module.PACKAGES}, "cells": cells})


def floating(options: argparse.Namespace, task: Task) -> None:
    """Save the float model's images, its calibration calls, and a copy of it for all peers.

    The copy matters because a zoo model may be in training meanwhile.
    """
    place = options.home / "float"
    task.pipe.save_pretrained(place / "model")
    torch.save(task.calls, place / "calls.pt")
    images(task, options.seeds, place / "images.npy")
    size = on_disk(Packed(task.model, {}, task.model.save_pretrained), place / "saved")
    shutil.rmtree(place / "saved")
    layers = task.adapter.layers()
    convolutions = [name for name in layers if isinstance(layers[name], torch.nn.Conv2d)]
    whole = {
        "layers": len(task.weights),
        "weights": sum(task.weights.values()),
        "in_convolutions": sum(task.weights[name] for name in convolutions),
        "in_ends": sum(task.weights[name] for name in task.ends),
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
    options = arguments()
    # Exit on SIGTERM, so that the running cell is ended too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    (options.home / options.peer).mkdir(parents=True, exist_ok=True)
    task = Task(
        options.model, Bits(8, 8), options.steps, options.images, options.iters, options.conditions
    )
    try:
        work = floating if options.peer == "float" else peer
        work(options, task)
    except Exception as error:
        write(
            options.home / options.peer, {"cannot": f"{type(error).__name__}: {shortened(error)}"}
        )
        traceback.print_exc()


if __name__ == "__main__":
    main()
