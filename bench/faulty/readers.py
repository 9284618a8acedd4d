"""Two writers and a reader of one folder: what is read is one of the two models, never a mix."""

import os
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import lowtide
from lowtide.checkpoint import folders


def rewrite(model: Path, place: Path) -> None:
    """Write a model over and over; another writer at the same time is refused, and tried again."""
    while True:
        try:
            with folders.written_beside(place) as fresh:
                shutil.copytree(model, fresh, dirs_exist_ok=True)
                (fresh / "lowtide-files.json").unlink()
        except lowtide.BadInput as error:
            if "another lowtide" not in str(error):
                raise
            time.sleep(0.001)


def read_while_written(models: tuple[Path, Path], room: Path, rounds: int) -> Counter[str]:
    """How often a reader got the first model, the second, a mix, or an error."""
    shutil.rmtree(room, ignore_errors=True)
    room.mkdir(parents=True)
    place = room / "place"
    shutil.copytree(models[0], place)
    marks = {_mark(lowtide.load(model)): model.name for model in models}
    assert len(marks) == 2
    writers = [_started(model, place) for model in models]
    counted: Counter[str] = Counter()
    try:
        for _ in range(rounds):
            try:
                counted[marks.get(_mark(lowtide.load(place)), "mix")] += 1
            except Exception as error:
                counted[f"{type(error).__name__}: {str(error)[:300]}"] += 1
    finally:
        for writer in writers:
            ended, _ = os.waitpid(writer, os.WNOHANG)
            if ended:
                counted["writer that failed"] += 1
            else:
                os.kill(writer, signal.SIGKILL)
                os.waitpid(writer, 0)
    return counted


def _started(model: Path, place: Path) -> int:
    child = os.fork()
    if child == 0:
        try:
            rewrite(model, place)
        finally:
            os._exit(1)
    return child


def _mark(pipe: object) -> tuple[str, str, str]:
    """What tells two models apart in each file: scheduler, configuration and weights."""
    unet = pipe.unet  # pyright: ignore[reportAttributeAccessIssue]
    betas = pipe.scheduler.config.beta_end  # pyright: ignore[reportAttributeAccessIssue]
    plan = unet.hf_quantizer.plan
    return str(betas), str(unet.config.norm_eps), f"{plan.method} {plan.summary}"
