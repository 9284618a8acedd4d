"""Draw images into a folder, and go on where an interrupted command stopped."""

import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowtide import sampling
from lowtide.checkpoint import facts, folders
from lowtide.checkpoint.manifest import altered
from lowtide.checkpoint.request_digest import request_digest
from lowtide.distributed.world import join
from lowtide.machine.device_names import AUTO
from lowtide.machine.room import Room
from lowtide.report import grids
from lowtide.sampling.call_values import recorded
from lowtide.sampling.recording import images_by_batch
from lowtide.stages.conditions import applied
from lowtide.stages.finished_work import (
    FinishedWork,
    finished_work,
    folder_beside,
    remove_runs,
)

NAME = "sampling.json"


def sample_to_folder(
    source: str,
    out: str | Path,
    request: sampling.Request,
    device: str = AUTO,
    *,
    own_steps: bool = False,
) -> dict[str, object]:
    """Draw one PNG per seed and a grid of them all.

    Finished batches stay in OUT.run until the images stand at OUT. Nothing is done where OUT holds
    the images of this very request.

    own_steps: a packed model takes as many steps as it was quantized for.
    """
    out = Path(out)
    folders.recover_missing(source)
    folder = sampling.local_folder(source)
    folders.check_place(out, folders.IMAGE_MARKS, folder)
    world = join()
    runs = world.of_first(lambda: folder_beside(out))
    pipe = sampling.as_pipeline(source, device=device)
    model = sampling.denoiser(pipe)
    if own_steps:
        request = replace(request, steps=facts.calibrated_steps(model) or request.steps)
    facts.check_steps(model, request.steps)
    place = next(model.parameters()).device
    digest = world.of_first(lambda: request_digest([source], request, place))
    if done := world.of_first(lambda: _finished(out, digest)):
        return done
    with world.inside(folders.written_beside(out, folders.IMAGE_MARKS, folder)) as fresh:
        work = finished_work(runs, digest, place, world)
        drawing = Drawing(work)
        with ExitStack() as stack:
            if work is not None:
                work.announce()
                work.keep_engines([model])
                stack.enter_context(applied(work.conditions))
            images = images_by_batch(pipe, request, drawing.batch, show_progress=True)
        seconds = sum(world.gathered([drawing.seconds]))
        report = {
            "folder": str(out),
            "images": len(images),
            "steps": request.steps,
            "seconds_per_step": round(seconds / request.steps, 4),
        }
        if fresh is not None:
            grids.write_images(fresh, images, request.seeds)
            written = {"run": digest, "model": source, "request": asdict(request)}
            text = json.dumps(written | {"report": report}, indent=1, default=recorded)
            (fresh / NAME).write_text(text + "\n")
    if world.first:
        remove_runs(runs)
    return report


def _finished(out: Path, digest: str | None) -> dict[str, object] | None:
    """The report of the command that drew the images at OUT, if they are whole, and of this one."""
    try:
        written: dict[str, Any] = json.loads((out / NAME).read_text(encoding="utf-8"))
        report = {**written["report"], "folder": str(out)}
        ours = digest is not None and written["run"] == digest
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not ours or altered(out):
        return None
    line = f"{out} holds these images: the same model, request and code. Nothing is done."
    print(line, file=sys.stderr)
    remove_runs(folder_beside(out))
    return report


@dataclass
class Drawing:
    """Draws batches, or takes them from the records of an interrupted run.

    seconds: that drawing took, in the interrupted run too.
    """

    work: FinishedWork | None
    seconds: float = 0.0

    def batch(self, pipe: sampling.Pipeline, request: sampling.Request, room: Room) -> np.ndarray:
        """The images of a batch."""
        name = f"images-from-{request.seeds[0]}"
        known = self.work.recorded(name) if self.work else None
        if known is not None:
            self.seconds += known["seconds"].item()
            return known["images"].numpy()
        started = time.perf_counter()
        images = sampling.run_pipeline(pipe, request, room)
        seconds = time.perf_counter() - started
        self.seconds += seconds
        if self.work:
            tensors = {
                "images": torch.from_numpy(images),
                "seconds": torch.tensor(seconds, dtype=torch.float64),
            }
            self.work.record(name, tensors)
        return images
