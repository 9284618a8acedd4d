"""A feature cache where several timesteps of a schedule round to one key of the clock."""

import pytest
import tiny
import torch
from diffusers import DDPMPipeline, EulerDiscreteScheduler

import lowtide
from lowtide import sampling
from lowtide.models import adapt
from lowtide.nn.clock import find_clock
from lowtide.stages.temporal_features import temporal_errors


@pytest.mark.parametrize("inputs", [8, 16])
def test_timesteps_that_round_to_one_key_share_a_row(inputs, tmp_path):
    """Karras' sigmas end less than one apart: 50 calls of the denoiser, 49 steps of the clock."""
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    original = tiny.model("unet2d")
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True, **betas)
    pipe = DDPMPipeline(tiny.model("unet2d"), scheduler)
    options = {
        "steps": 50,
        "inputs": inputs,
        "stages": {"maintain": {} if inputs == 8 else {"bits": 32, "block": 16}},
        "images": 1,
        "calibration_steps": 1,
        "iters": 2,
        "batch": 1,
    }
    result = lowtide.quantize(pipe, method="temporal_cache", **options)
    times = [
        float(moment.t[0])
        for moment in sampling.trajectory(result.pipe, sampling.Request(steps=50, seeds=(0,)))
    ]
    assert len(times) == 50 and len({round(t) for t in times}) == 49
    assert result.plan.times == tuple(
        t for place, t in enumerate(times) if round(t) not in map(round, times[:place])
    )
    assert 0.5 < result.report["temporal"]["cached_share"] <= 1
    cached = result.model.mid_block.resnets[0].time_emb_proj
    assert (
        len(cached.cached(torch.arange(49)))
        == len(cached.values if inputs == 16 else cached.scale)
        == 49
    )
    error = temporal_errors(adapt(original), original, pipe.unet, result.plan.times)
    assert error.max() < (1e-10 if inputs == 16 else 1e-2)
    request = sampling.Request(steps=50, seeds=(0,))
    before = sampling.images(result.pipe, request)
    result.save(tmp_path / "cached")
    assert (sampling.images(lowtide.load(tmp_path / "cached"), request) == before).all()
    assert not find_clock(pipe.unet).added
