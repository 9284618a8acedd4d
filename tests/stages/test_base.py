"""Recipes run stage by stage, and each stage says what it did."""

import io
import re
from dataclasses import dataclass

import tiny
from rich.console import Console

from lowtide import sampling
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Stage, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Reconstruct
from lowtide.stages.tiar import TIAR


@dataclass(frozen=True)
class Silent(Stage):
    """A stage whose class speaks for it."""

    def run(self, job: Job) -> None:
        pass


def test_every_stage_says_what_it_did_and_how_long_it_took():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    settings = Settings(steps=3, images=2, calibration_steps=2, iters=1, batch=2, inputs=4)
    console = Console(file=io.StringIO(), width=40)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test", console=console)
    start = (Collect(), Assign(per_step=True), FitWeights("minmax"), TIAR(), Reconstruct())
    run_recipe((*start, FitRanges(), LearnRanges(iters=1), Silent(), Pack()), job)
    lines = console.file.getvalue().splitlines()
    layers = len(job.plan.layers)
    blocks = len([unit for unit in job.adapter.units() if unit.kind != "temporal"])
    expected = [
        "Collect: 3 calls of the denoiser recorded at 3 timesteps",
        f"Assign: formats chosen for {layers} layers",
        f"FitWeights: weights of {layers} layers rounded to nearest",
        "TIAR: rounding of the temporal block learnt for its own features",
        f"Reconstruct: rounding of {blocks} blocks learnt",
        r"FitRanges: ranges of \d+ inputs fitted",
        f"LearnRanges: input ranges of {blocks} blocks learnt",
        "Silent: a stage whose class speaks for it",
        f"Pack: codes of {layers} layers packed",
    ]
    said = [line for line in lines if re.search(r"\d s$", line)]
    for line, words in zip(said, expected, strict=True):
        assert re.fullmatch(rf"{words}, \d+\.\d s", line)
    names = [words.split(":")[0] for words in expected]
    assert list(job.report["seconds"]) == list(job.report["summaries"]) == names
