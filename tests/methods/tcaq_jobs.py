"""Jobs on a tiny model with assigned formats, for the tests of TCAQ-DM."""

import tiny
import torch

from lowtide import sampling
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect

OPTIONS = {"steps": 4, "images": 2, "calibration_steps": 4, "iters": 10, "batch": 2}


def started(model, **options) -> Job:
    pipe = (
        sampling.as_pipeline(model)
        if hasattr(model, "config") and "down_block_types" in model.config
        else None
    )
    job = Job(pipe, model, adapt(model), Settings(**OPTIONS | options), "test")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


def uneven(seed: int = 0):
    """A tiny UNet with a few heavy channels, as trained ones have."""
    model = tiny.model("unet2d", seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight[::5] *= 12
    return model


def distance(ours, theirs) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()
