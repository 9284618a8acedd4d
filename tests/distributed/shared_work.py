"""Work that one process and two do alike: `python shared_work.py HOME` does it under torchrun.

Models are in float64. A batch in two halves is summed in another order than the whole: in float32
that moves a value by 1e-7 of itself, now and then to the other side of a rounding, and that is an
error of 1e-4. In float64 nothing is rounded the other way, and the results show only whether the
arithmetic is the same.
"""

import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import cli, sampling, settings
from lowtide.distributed.world import join
from lowtide.errors import BadInput
from lowtide.formats import search
from lowtide.machine import bf16
from lowtide.methods import METHODS, relevant_options
from lowtide.nn import rounding
from lowtide.stages import distill, reconstruct
from lowtide.stages.reconstruct import Learner

# Three batches of two images: two processes have unequal parts of them.
OPTIONS = {
    "steps": 2,
    "images": 6,
    "calibration_steps": 1,
    "iters": 2,
    "range_iters": 2,
}
BATCH = 4  # of all processes
WORK = {method: ("unet", method, {}) for method in METHODS} | {
    # The batch is larger than the five samples: three for one process, two for the other.
    "few samples": ("unet", "qdiffusion", {"images": 5, "batch": 16}),
    "few samples, distilled": ("unet", "efficientdm", {"steps": 3, "batch": 16}),
    "layer by layer": ("unet", "tfmq", {"scope": "layer", "early_stop": True}),
    "some inputs rounded": ("unet", "qdiffusion", {"drop": 0.5}),
    "few bits": ("unet", "best", {"weights": 3, "inputs": 4}),
    "conditional, some inputs rounded": ("sd", "tfmq", {"drop": 0.5}),
    "transformer": ("dit", "tfmq", {}),
    "transformer, distilled": ("dit", "mpq", {}),
}
REQUEST = sampling.Request(steps=2, seeds=(5, 3, 8, 1, 9), batch=2)
COMMAND = ("--method", "tfmq", "--steps", "2", "--images", "2", "--calibration-steps", "1")
COMMAND += ("--iters", "2", "--device", "cpu", "--batch")


@contextmanager
def quickly() -> Iterator[pytest.MonkeyPatch]:
    """Products in the model's precision, searches with few candidates, small batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "time_in_bf16", lambda kind: float("inf"))
        patch.setattr(search, "COARSE", 2)
        patch.setitem(search.SEARCHES, "mse", partial(search.mse, candidates=4))
        patch.setattr(reconstruct, "JUDGES", 2)
        patch.setattr(distill, "JUDGES", 2)
        patch.setattr(settings, "LARGEST_BATCH", 2)
        yield patch


def pipeline(kind: str, home: Path) -> sampling.Pipeline:
    """A small pipeline of this kind in float64; its tokenizer is written to a folder."""
    home = home / f"tokenizer-{join().rank}-of-{join().size}"
    home.mkdir(exist_ok=True)
    if kind == "dit":
        return tiny_pipelines.PIPELINES["dit"](home).to(torch.float64)
    changes = {
        "block_out_channels": (16,),
        "down_block_types": ("AttnDownBlock2D" if kind == "unet" else "CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    }
    torch.manual_seed(0)
    if kind == "unet":
        return sampling.as_pipeline(tiny.unet2d(**changes).eval()).to(torch.float64)
    pipe = tiny_pipelines.PIPELINES["sd"](home)
    pipe.register_modules(unet=tiny.unet_condition(**changes).eval())
    return pipe.to(torch.float64)


def quantized(home: Path, kind: str, method: str, changes: dict) -> dict:
    """Losses of all units, the roundings as they were learnt, and the packed model's tensors."""
    batch = changes.get("batch", BATCH) // join().size
    conditions = {} if kind == "unet" else tiny_pipelines.request_fields(kind)
    options = relevant_options(method, OPTIONS | conditions | changes | {"batch": batch})
    alphas: list[torch.Tensor] = []
    step = rounding.RoundingOptimizer.step

    def recorded(self, penalty, sharpness) -> None:
        step(self, penalty, sharpness)
        alphas.append(torch.cat([each.alpha.flatten() for each in self.each]))

    with pytest.MonkeyPatch.context() as patch:
        if kind != "dit":  # where each process rounds other temporal units
            patch.setattr(rounding.RoundingOptimizer, "step", recorded)
        result = lowtide.quantize(pipeline(kind, home), method=method, **options)
    return {
        "losses": result.report.get("losses", {}),
        "alphas": alphas,
        "state": result.model.state_dict(),
        "batch": result.report["batch"] if "batch" in options else None,
    }


def drawn(home: Path) -> np.ndarray:
    """Images of the packed model, layer by layer: no race chooses what runs it."""
    return sampling.images(lowtide.load(home / "packed", fused=False), REQUEST)


def compared(home: Path) -> dict:
    """What an evaluation measures, without its times."""
    packed = lowtide.load(home / "packed", fused=False)
    original = lowtide.load(home / "float")
    place = home / f"evidence-{join().size}"
    result = lowtide.evaluate(
        packed, reference=original, out=place, seeds=REQUEST.seeds, batch=2
    ).as_json()
    models = {name: model | {"seconds_per_step": 0} for name, model in result["models"].items()}
    return {"models": models, "request": result["request"]}


def primitives() -> dict:
    """What the processes tell each other."""
    world = join()
    gradients = [torch.zeros(2, 3), torch.zeros(())]
    if world.rank == 0:  # the other has no sample
        for number, parameter in enumerate(gradients):
            parameter.grad = torch.full_like(parameter, number + 1)
    loss = world.sum_gradients(torch.tensor(0.5 * (1 - world.rank)), gradients)
    low = torch.tensor([1.0, 2.0]) + world.rank
    high = torch.tensor([-1.0, float("-inf")]) + world.rank
    world.extremes([low], [high])
    wrong = ""
    try:
        world.of_first(_wrong)
    except BadInput as error:
        wrong = str(error)
    return {
        "gathered": world.gathered(world.part("abcde")),
        "total": world.total(1.5),
        "loss": float(loss),
        "gradients": [parameter.grad.tolist() for parameter in gradients],
        "extremes": (low.tolist(), high.tolist()),
        "first": world.of_first(lambda: world.rank),
        "wrong": wrong,
    }


def _wrong() -> None:
    raise BadInput("found a", "b", "c")


def resumed(home: Path) -> dict:
    """The units that the command learns after a process died in it, and its exit code.

    The second process is in another folder, so it sees nothing of the first one's files.
    """
    world = join()
    elsewhere = home / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    learnt: list[str] = []
    search_before = Learner.search

    def counted(self, loss):
        learnt.append(f"{self.stage} {self.unit.name}")
        return search_before(self, loss)

    argv = ["lowtide", "quantize", str(home / "float"), "--out", "resumed", *COMMAND, "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home if world.first else elsewhere)
        patch.setattr(sys, "argv", argv)
        patch.setattr(Learner, "search", counted)
        try:
            cli.main()
        except SystemExit as end:
            return {"learnt": learnt, "code": end.code or 0}
    return {}


def main(home: Path) -> None:
    """All of the work; one file of results for each process."""
    results: dict = {"primitives": primitives()}
    with quickly():
        for name, (kind, method, changes) in WORK.items():
            results[name] = quantized(home, kind, method, changes)
        results["images"] = drawn(home)
        results["evaluation"] = compared(home)
        results["resumed"] = resumed(home)  # last, because a command leaves the group
    (home / f"rank-{join().rank}.pickle").write_bytes(pickle.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
