"""Q-Diffusion on a random model: the split is exact, and both halves are learnt."""

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline

import lowtide
from lowtide import sampling
from lowtide.methods.qdiffusion import Split
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.base import Job
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import run_call

OPTIONS = {
    "weights": 4,
    "inputs": 8,
    "steps": 4,
    "images": 4,
    "calibration_steps": 2,
    "iters": 10,
    "range_iters": 4,
    "batch": 8,
}


def collected(**options) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(**OPTIONS | options), "qdiffusion")
    Collect().run(job)
    return job


def test_every_shortcut_over_two_tensors_is_split_where_they_meet():
    job = collected()
    joined = {
        name: width
        for name, width in job.adapter.concatenations().items()
        if "conv_shortcut" in name
    }
    before = run_call(job, job.calls[1])[0]
    Split().run(job)
    assert job.report["split"] == list(joined) and all(
        name.startswith("up_blocks.") for name in joined
    )
    halves = [job.model.get_submodule(f"{name}.first") for name in joined]
    assert [half.in_channels for half in halves] == list(joined.values())
    after = run_call(job, job.calls[1])[0]
    assert (after - before).norm() / before.norm() < 1e-6


def test_splitting_helps_where_the_two_halves_are_far_apart():
    """The reason for the split: with one range over both halves, the quiet one drowns."""

    def error(without: tuple[str, ...]) -> float:
        original = tiny.model("unet2d")
        model = tiny.model("unet2d")
        for unet in (original, model):
            adapter = adapt(unet)
            for name, width in adapter.concatenations().items():
                if "conv_shortcut" in name:
                    unet.get_submodule(name).weight.data[:, width:] *= 0.02
        pipe = sampling.as_pipeline(model)
        lowtide.quantize(
            pipe, method="qdiffusion", without=(*without, "reconstruct", "learnranges"), **OPTIONS
        )
        moments = list(
            sampling.trajectory(
                sampling.as_pipeline(original), sampling.Request(steps=4, seeds=(0, 1))
            )
        )
        with torch.no_grad():
            apart = [
                pipe.unet(moment.arguments["sample"], moment.t)[0] - moment.eps
                for moment in moments
            ]
        return float(
            torch.stack(apart).norm() / torch.stack([moment.eps for moment in moments]).norm()
        )

    assert error(()) < error(("split",))


def test_both_halves_decide_their_rounding():
    result = lowtide.quantize(
        sampling.as_pipeline(tiny.model("unet2d")), method="qdiffusion", **OPTIONS | {"iters": 60}
    )
    plain = lowtide.quantize(
        sampling.as_pipeline(tiny.model("unet2d")),
        method="qdiffusion",
        without=("reconstruct", "learnranges"),
        **OPTIONS,
    )
    for name in result.report["split"]:
        for half in ("first", "second"):
            ours, nearest = (each.model.get_submodule(f"{name}.{half}") for each in (result, plain))
            assert ours.weight.dtype == torch.uint8 and not torch.equal(ours.weight, nearest.weight)


@pytest.mark.parametrize("options", [{"profile": "tfmq"}, {"weights": 16, "inputs": 32}])
def test_nothing_is_split_where_shortcuts_stay_in_float(options):
    original = tiny.model("unet2d")
    result = lowtide.quantize(
        sampling.as_pipeline(tiny.model("unet2d")), method="qdiffusion", **OPTIONS | options
    )
    assert result.report["split"] == []
    if options.get("weights") == 16:
        x = torch.randn(2, 3, 8, 8)
        assert torch.equal(result.model(x, 750)[0], original(x, 750)[0])


def test_a_transformer_has_no_shortcut_to_split(tmp_path):
    pipe = tiny_pipelines.PIPELINES["dit"](tmp_path)
    conditions = tiny_pipelines.request_fields("dit")
    assert (
        lowtide.quantize(pipe, method="qdiffusion", **OPTIONS | {"iters": 2}, **conditions).report[
            "split"
        ]
        == []
    )


@pytest.mark.parametrize("name", ["ddim", "sdxl"])
def test_end_to_end_through_the_checkpoint(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    conditions = tiny_pipelines.request_fields(name)
    result = lowtide.quantize(pipe, method="qdiffusion", **OPTIONS | {"iters": 2}, **conditions)
    assert result.report["split"]
    request = sampling.Request(steps=4, seeds=(5, 6), batch=2, **conditions)
    ours = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(
            DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed")), request
        ),
        ours,
    )
