"""Jobs on a tiny model at two bits, for the tests of MPQ-DM."""

import tiny

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, relevant_options
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect

OPTIONS = {
    "weights": 2,
    "inputs": 6,
    "steps": 4,
    "images": 4,
    "calibration_steps": 2,
    "iters": 4,
    "batch": 8,
}


def prepared(*stages, **settings) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    pipe.unet.requires_grad_(False)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(**OPTIONS | settings), "test")
    run_recipe((Collect(), Assign(per_step=True), *stages), job)
    return job


def quantized(recipe, monkeypatch, **options):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    monkeypatch.setitem(METHODS, "this", lambda settings: recipe)
    relevant = relevant_options("this", OPTIONS | options)
    return lowtide.quantize(pipe, method="this", **relevant)
