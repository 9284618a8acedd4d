"""Learning has gradients, whatever mode the caller is in."""

from contextlib import nullcontext

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput


def test_gradients_that_the_caller_switched_off_are_no_obstacle():
    options = {"method": "tfmq", "steps": 2, "images": 1, "calibration_steps": 1}
    options |= {"iters": 2, "batch": 1}
    results = []
    for switched in (nullcontext, torch.no_grad):
        with switched():
            result = lowtide.quantize(sampling.as_pipeline(tiny.model("unet2d")), **options)
            results.append(result.model.state_dict())
    first, second = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.inference_mode(), pytest.raises(BadInput, match=r"found torch.inference_mode"):
        lowtide.quantize(sampling.as_pipeline(tiny.model("unet2d")), **options)
