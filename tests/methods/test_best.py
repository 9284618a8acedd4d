"""best: what it composes, at which width."""

import numpy as np
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.evaluation import path_errors
from lowtide.methods import METHODS
from lowtide.settings import Settings

OPTIONS = {
    "weights": 4,
    "inputs": 8,
    "steps": 4,
    "images": 16,
    "calibration_steps": 4,
    "iters": 4,
    "range_iters": 2,
    "batch": 8,
}


def stages(weights, inputs):
    return {
        type(stage).__name__ for stage in METHODS["best"](Settings(weights=weights, inputs=inputs))
    }


def test_stages_follow_the_width():
    assert "Distill" not in stages(4, 8)
    assert "Distill" not in stages(6, 6)
    assert "Distill" in stages(3, 8) & stages(4, 4)
    assert all(
        "OMQ" in stages(*width) and "TCR" not in stages(*width)
        for width in ((8, 8), (4, 8), (6, 6), (2, 4))
    )
    assert not {"DAQ", "LearnRanges"} & stages(4, 8)
    assert "LearnRanges" in stages(4, 6) and "DAQ" not in stages(4, 6) | stages(2, 6)
    assert {"DAQ", "LearnRanges"} <= stages(4, 4)
    assert all("Bias" in stages(*width) for width in ((8, 8), (4, 8), (2, 4)))


def test_the_mean_error_of_a_step_is_taken_off():
    """On images outside the calibration set, and the whole error of a step falls too.

    Without OMQ, which leaves this model little mean error.
    """
    request = sampling.Request(steps=4, seeds=tuple(range(100, 164)))
    calls = path_errors.draw(sampling.as_pipeline(tiny.model("unet2d")), request).calls

    def systematic(model):
        with torch.no_grad():
            return np.mean(
                [
                    float((model(**call.arguments)[0] - call.eps).mean((0, 2, 3)).norm())
                    for call in calls
                ]
            )

    whole, without = (
        lowtide.quantize(
            sampling.as_pipeline(tiny.model("unet2d")), method="best", without=left_out, **OPTIONS
        ).model
        for left_out in (("omq",), ("omq", "bias"))
    )
    assert systematic(whole) < 0.4 * systematic(without)
    assert path_errors.step_error(whole, calls) < path_errors.step_error(without, calls)
