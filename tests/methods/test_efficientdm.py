"""EfficientDM on a random model: distilling helps, and 16 bits change nothing."""

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, efficientdm, relevant_options
from lowtide.nn.swap import find_clock
from lowtide.settings import Settings
from lowtide.stages.distill import Distill

OPTIONS = {
    "weights": 3,
    "inputs": 6,
    "steps": 4,
    "images": 4,
    "iters": 20,
    "batch": 8,
}
REQUEST = sampling.Request(steps=4, seeds=(0, 1, 2, 3))


def error(recipe, monkeypatch, **options) -> float:
    """Relative error of the quantized model on the float trajectory of uncalibrated images."""
    original = sampling.as_pipeline(tiny.model("unet2d"))
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    monkeypatch.setitem(METHODS, "this", lambda settings: recipe)
    lowtide.quantize(pipe, method="this", **relevant_options("this", OPTIONS | options))
    moments = list(sampling.trajectory(original, REQUEST))
    with torch.no_grad():
        apart = [
            pipe.unet(moment.arguments["sample"], moment.t)[0] - moment.eps for moment in moments
        ]
    return (
        torch.stack(apart).norm() / torch.stack([moment.eps for moment in moments]).norm()
    ).item()


def test_distilling_helps_on_fresh_images_and_left_out_is_the_ablation(monkeypatch):
    recipe = efficientdm.recipe(Settings())
    without = tuple(stage for stage in recipe if not isinstance(stage, Distill))
    assert error(recipe, monkeypatch, iters=60, images=8) < 0.93 * error(
        without, monkeypatch, images=8
    )


def test_sixteen_bits_change_nothing():
    original = tiny.model("unet2d")
    result = lowtide.quantize(
        sampling.as_pipeline(tiny.model("unet2d")),
        method="efficientdm",
        **OPTIONS | {"weights": 16, "inputs": 32},
    )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(result.model(x, 750)[0], original(x, 750)[0])


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_end_to_end_through_the_checkpoint(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    conditions = tiny_pipelines.request_fields(name)
    result = lowtide.quantize(pipe, method="efficientdm", **OPTIONS | {"iters": 2}, **conditions)
    assert find_clock(result.model).scale.shape[1] == len(result.plan.timesteps) == 4
    request = sampling.Request(steps=4, seeds=(5, 6), batch=2, **conditions)
    ours = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(
            DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed")), request
        ),
        ours,
    )
