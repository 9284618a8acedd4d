"""What the figures share: a calibrated job, the error of its predictions, a sheet to draw on."""

from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lowtide import sampling
from lowtide.methods import ptqd
from lowtide.models import adapt
from lowtide.report.palette import HAIR, INK, QUIET
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Stage, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights

MODEL = "zoo:digits"
SMALL = {"steps": 20, "images": 4, "calibration_steps": 20, "iters": 100, "batch": 16}


def started(model: str = MODEL, *, per_step: bool = True, **settings) -> Job:
    pipe = sampling.load_pipeline(model)
    denoiser = sampling.denoiser(pipe).requires_grad_(False)
    adapter = adapt(denoiser, sampling.example_inputs(pipe))
    job = Job(pipe, denoiser, adapter, Settings(**SMALL | settings), "figures")
    run_recipe((Collect(), Assign(per_step=per_step)), job)
    return job


def fitted(*stages: Stage, per_step: bool = False, **settings) -> Job:
    """Everything rounded to nearest, with ranges by mse, after these stages."""
    job = started(per_step=per_step, **settings)
    run_recipe((*stages, FitWeights("mse"), FitRanges("mse")), job)
    return job


def held_out() -> list[Call]:
    """The float model's trajectories from seeds that no calibration here uses."""
    return started(seed=1, images=8).calls


def noise(job: Job, calls: list[Call]) -> ptqd.Moments:
    """The moments of the quantization error on these calls, by step."""
    return ptqd.measure(replace(job, calls=calls))


def sheet(columns: int, width: float = 4.6) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width * columns, 3.6), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.spines[["left", "bottom"]].set_color(HAIR)
    return figure, axes


def title(axes: Axes, text: str, xlabel: str, ylabel: str) -> None:
    """Title and labels; call this after setting an axis' scale, which makes new ticks."""
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(xlabel, fontsize=8.5, color=QUIET)
    axes.set_ylabel(ylabel, fontsize=8.5, color=QUIET)
    axes.tick_params(which="both", colors=QUIET, labelsize=8, length=0)
