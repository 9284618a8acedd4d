"""PTQ4DM on a random model: it draws timesteps that lean towards the image."""

from collections import Counter

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DiffusionPipeline, HeunDiscreteScheduler

import lowtide
from lowtide import sampling
from lowtide.methods.ptq4dm import NDTC
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.base import Job
from lowtide.stages.collect import Collect

OPTIONS = {
    "weights": 4,
    "inputs": 8,
    "steps": 6,
    "images": 4,
    "calibration_steps": 3,
}


def collected(**options) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), Settings(**OPTIONS | options), "ptq4dm")
    Collect().run(job)
    return job


def test_draws_follow_the_normal_distribution_clamped_to_the_schedule():
    drawn = NDTC().draw(200_000, 100, torch.Generator().manual_seed(0)).double()
    inner = drawn[(drawn > 0) & (drawn < 99)]
    assert drawn.min() == 0 and drawn.max() == 99
    assert drawn.median() == pytest.approx(40, abs=1)
    # Of N(0.4, 0.5) the share below 0 and above 0.99 piles up at the ends of the schedule.
    assert (drawn == 0).double().mean() == pytest.approx(0.2186, abs=0.01)
    assert (drawn == 99).double().mean() == pytest.approx(0.119, abs=0.01)
    assert inner.mean() < 50


def test_only_drawn_calls_serve_each_with_its_own_timestep():
    job = collected()
    recorded = {id(call.arguments): call.timestep for call in job.calls}
    NDTC().run(job)
    assert len(job.calls) == sum(job.report["ndtc"].values()) == OPTIONS["calibration_steps"]
    assert all(recorded[id(call.arguments)] == call.timestep and call.kept for call in job.calls)


def test_a_solver_that_calls_some_timesteps_twice():
    """Heun calls every timestep twice except the first: 17 and 34 calls for 17 batches."""
    pipe = sampling.ModulePipeline(tiny.model("unet2d"), HeunDiscreteScheduler(), (3, 8, 8))
    job = Job(
        pipe,
        pipe.unet,
        adapt(pipe.unet),
        Settings(**OPTIONS | {"images": 34, "calibration_steps": 6}),
        "ptq4dm",
    )
    Collect().run(job)
    counts = Counter(call.timestep for call in job.calls)
    assert sorted(counts.values()) == [17, 34, 34, 34, 34, 34]
    NDTC(std=1.0).run(job)
    assert len(job.calls) == 6 * 17 and set(job.report["ndtc"]) == set(counts)
    # Of a timestep that is called twice the calls of both kinds serve.
    most = max(job.report["ndtc"], key=job.report["ndtc"].get)
    assert len({id(call.arguments["sample"]) for call in job.calls if call.timestep == most}) > 17


def test_a_range_for_each_step_has_one_for_those_that_were_not_drawn():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    options = OPTIONS | {"stages": {"assign": {"per_step": True}}}
    result = lowtide.quantize(pipe, method="ptq4dm", **options)
    assert len(result.report["ndtc"]) < OPTIONS["steps"]
    assert result.model.lowtide_clock.scale.isfinite().all()
    with torch.no_grad():
        assert all(
            result.model(torch.randn(1, 3, 8, 8), timestep)[0].isfinite().all()
            for timestep in (0, 166, 332, 498, 664, 830)
        )


def test_what_leans_towards_the_image_reads_early_timesteps():
    job = collected(steps=20, calibration_steps=20)
    every = sorted({call.timestep for call in job.calls})
    NDTC(mean=0.1, std=0.05).run(job)
    assert max(job.report["ndtc"]) <= every[len(every) // 2]


def test_sixteen_bits_change_nothing():
    original = tiny.model("unet2d")
    options = OPTIONS | {"weights": 16, "inputs": 32}
    result = lowtide.quantize(
        sampling.as_pipeline(tiny.model("unet2d")), method="ptq4dm", **options
    )
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(result.model(x, 750)[0], original(x, 750)[0])


@pytest.mark.parametrize("name", ["ddim", "sd"])
def test_end_to_end_through_the_checkpoint(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    conditions = tiny_pipelines.request_fields(name)
    result = lowtide.quantize(pipe, method="ptq4dm", **OPTIONS | {"steps": 4}, **conditions)
    request = sampling.Request(steps=4, seeds=(5, 6), batch=2, **conditions)
    ours = sampling.images(pipe, request)
    assert np.array_equal(
        sampling.images(
            DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed")), request
        ),
        ours,
    )
