"""Trials: a damaged folder is loaded by lowtide and by plain diffusers, and what happens is judged.

A worker process loads; its parent stops it after too long, and goes on with another. A trial ends
as one of:

    refused      one sentence that names the file, tensor or field
    same         loaded, and its pictures are those of the whole folder, bit for bit
    other        loaded, and its pictures are others
    nameless     one sentence that names none of them
    traceback    any other exception
    slow         more than 10 s
    large        more than twice the memory of a whole folder, and 64 MiB
"""

import random
import re
import resource
import shutil
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from faulty.damage import DAMAGES, Fault, NothingToDo
from faulty.nonsense import NONSENSES

SECONDS = 10
SLACK = 64 << 20
GOOD = ("refused", "same")
LOADERS = ("lowtide", "diffusers")
MOST = 6 << 30  # bytes of address space of a worker


@dataclass(frozen=True)
class Trial:
    """One loader on one damaged folder."""

    number: int
    model: str
    kind: str
    what: str
    loader: str
    outcome: str
    said: str
    seconds: float


def broken(folder: Path, number: int, others: list[Path]) -> Fault:
    """Damage a folder; the same number does the same."""
    rng = random.Random(number)
    while True:
        try:
            return rng.choice(DAMAGES if number % 2 else NONSENSES)(folder, rng, others)
        except NothingToDo:
            continue


class Worker:
    """A process that loads folders, one after the other."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        context = get_context("spawn")
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        assert self.line.poll(300)
        self.line.recv()

    def ask(self, folder: Path, loader: str) -> dict[str, Any]:
        """What the worker says of a folder; where it is too slow or dies, that."""
        started = time.perf_counter()
        self.line.send((str(folder), loader))
        try:
            if self.line.poll(3 * SECONDS):
                return self.line.recv()
            reason = "slow"
        except (EOFError, OSError):
            reason = "died"
        self.process.kill()
        self.process.join()
        self.start()
        return {"outcome": reason, "said": "", "seconds": time.perf_counter() - started}

    def stop(self) -> None:
        self.process.kill()
        self.process.join()


def _work(line: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    loads()
    resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    line.send("ready")
    while True:
        folder, loader = line.recv()
        line.send(attempt(Path(folder), loader))


def loads() -> dict[str, Callable[[Path], Any]]:
    from diffusers import DiffusionPipeline

    import lowtide

    return {"lowtide": lowtide.load, "diffusers": DiffusionPipeline.from_pretrained}


def attempt(folder: Path, loader: str) -> dict[str, Any]:
    """Load a folder and draw; what came of it, in which time, and in how much memory."""
    from lowtide.errors import BadInput

    load = loads()[loader]
    _forget_peak()
    before = _kilobytes("VmRSS")
    started = time.perf_counter()
    answer: dict[str, Any] = {"outcome": "loaded", "said": "", "seconds": 0.0, "bytes": 0}
    try:
        pipe = load(folder)
        answer["seconds"] = time.perf_counter() - started
        answer["bytes"] = (_kilobytes("VmHWM") - before) << 10
        answer["images"] = _drawn(pipe)
    except BadInput as error:
        answer |= {"outcome": "refused", "said": str(error)}
    except Exception:
        answer |= {"outcome": "traceback", "said": traceback.format_exc()}
    if not answer["seconds"]:
        answer["seconds"] = time.perf_counter() - started
        answer["bytes"] = (_kilobytes("VmHWM") - before) << 10
    return answer


def _drawn(pipe: Any) -> np.ndarray:
    import torch

    import lowtide
    from lowtide.sampling import quiet_libraries

    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    prompt = {"prompt": "ab"} if "tokenizer" in pipe.components else {}
    with quiet_libraries(), lowtide.unfused(pipe):
        return pipe(**prompt, num_inference_steps=3, generator=generator, output_type="np").images


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _kilobytes(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+)", text)
    assert found
    return int(found[1])


Ask = Callable[[Path, str], dict[str, Any]]


@dataclass(frozen=True)
class Whole:
    """What a whole folder gives: its pictures, and how many bytes loading takes."""

    images: np.ndarray
    bytes: int


def wholes(ask: Ask, models: Sequence[Path]) -> dict[tuple[Path, str], Whole]:
    found: dict[tuple[Path, str], Whole] = {}
    for model in models:
        for loader in LOADERS:
            answers = [ask(model, loader) for _ in range(3)]
            assert all(each["outcome"] == "loaded" for each in answers), answers
            most = max(each["bytes"] for each in answers)
            found[model, loader] = Whole(answers[0]["images"], most)
    return found


def trials(models: Sequence[Path], numbers: Sequence[int], room: Path) -> Iterator[Trial]:
    """Damage a copy of a model for each number, and load it with each loader."""
    worker = Worker()
    known = wholes(worker.ask, models)
    for number in numbers:
        model = models[number // 2 % len(models)]
        copy = room / f"{model.name}-{number}"
        shutil.copytree(model, copy)
        try:
            fault = broken(copy, number, [other for other in models if other != model])
            for loader in LOADERS:
                answer = worker.ask(copy, loader)
                outcome = judged(answer, fault, known[model, loader])
                said = answer["said"][-2000:]
                seconds = round(answer["seconds"], 2)
                yield Trial(
                    number, model.name, fault.kind, fault.what, loader, outcome, said, seconds
                )
        finally:
            shutil.rmtree(copy)
    worker.stop()


def judged(answer: dict[str, Any], fault: Fault, whole: Whole) -> str:
    outcome = answer["outcome"]
    if answer["seconds"] > SECONDS:
        return "slow"
    if answer.get("bytes", 0) > 2 * whole.bytes + SLACK:
        return "large"
    if outcome == "refused":
        return (
            "refused"
            if any(word and word in answer["said"] for word in fault.words)
            else "nameless"
        )
    if outcome == "loaded":
        return "same" if np.array_equal(answer["images"], whole.images) else "other"
    return outcome


def is_right(trial: Trial) -> bool:
    return trial.outcome in GOOD
