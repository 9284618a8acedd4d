"""Images of the same seeds, drawn fused and layer by layer."""

import lowtide
from lowtide import sampling
from lowtide.evaluation.metrics.pairs import psnr


def test_a_trained_model_draws_the_same_images():
    packed = lowtide.quantize("zoo:digits", method="minmax", weights=8, steps=20, images=4)
    request = sampling.Request(steps=20, seeds=(11, 12, 13, 14), batch=2)
    fused = sampling.images(packed.pipe, request)
    with lowtide.unfused(packed.model):
        plain = sampling.images(packed.pipe, request)
    assert psnr(fused, plain) > 45
