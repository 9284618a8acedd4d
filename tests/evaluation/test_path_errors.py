"""The parts of an error along a path, and what temporal features alone do to the images."""

import numpy as np
import packed_pair
import pytest
import tiny
import torch

from lowtide import sampling
from lowtide.evaluation.path_errors import (
    draw,
    error_parts,
    image_error,
    step_error,
    temporal_damage,
)
from lowtide.models import adapt
from lowtide.nn.swap import find_clock
from lowtide.stages.temporal_features import TemporalFeatures, temporal_errors

REQUEST = sampling.Request(steps=3, seeds=(0, 1, 2, 3), batch=4)


@pytest.fixture(scope="module")
def floating():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    sampling.denoiser(pipe).requires_grad_(False).eval()
    return pipe


def moved(calls, error) -> list[sampling.Moment]:
    """The calls with answers that are off by error(step, answer)."""
    return [
        sampling.Moment(each.index, each.t, each.arguments, each.eps + error(step, each.eps))
        for step, each in enumerate(calls)
    ]


def test_the_steady_part_of_an_error(floating):
    model = sampling.denoiser(floating)
    calls = draw(floating, REQUEST).calls[:2]
    size = 0.5 * torch.cat([each.eps for each in calls]).square().mean().sqrt().item()
    image_signs = torch.tensor([1.0, -1.0, 1.0, -1.0]).reshape(-1, 1, 1, 1)
    always = error_parts(model, moved(calls, lambda step, eps: torch.full_like(eps, size)))
    assert (always.whole, always.steady) == pytest.approx([0.5] * 2, rel=1e-4)
    by_step = error_parts(
        model, moved(calls, lambda step, eps: torch.full_like(eps, size * (-1) ** step))
    )
    assert by_step.whole == pytest.approx(0.5, rel=1e-4)
    assert by_step.steady < 1e-4
    by_image = error_parts(
        model, moved(calls, lambda step, eps: torch.full_like(eps, size) * image_signs)
    )
    assert by_image.whole == pytest.approx(0.5, rel=1e-4)
    assert by_image.steady < 1e-4


def test_the_float_model_has_no_error_on_its_own_path(floating):
    calls = draw(floating, REQUEST).calls
    assert error_parts(sampling.denoiser(floating), calls).whole == 0
    assert step_error(sampling.denoiser(floating), calls) == 0


def test_an_image_error_by_hand():
    reference = np.array([[0.0, 1.0], [1.0, 0.0]])
    images = np.array([[0.1, 1.0], [1.0, 0.0]])
    assert image_error(images, reference) == pytest.approx(0.1)
    assert image_error(reference, reference) == 0


def test_a_steady_error_of_the_features_moves_the_images(floating):
    """Features off by a share are seen in full, and the damage grows with the share."""
    model = sampling.denoiser(floating)
    original = draw(floating, REQUEST)
    adapter = adapt(model, original.calls[0].arguments)
    errors = []
    for share in (0.0, 0.01, 0.1):
        other = sampling.denoiser(sampling.as_pipeline(tiny.model("unet2d"))).eval()
        for unit in adapter.temporal():
            for name in unit.features:
                layer = other.get_submodule(name)
                layer.weight.data *= 1 + share
                layer.bias.data *= 1 + share
        damage = temporal_damage(floating, other, adapter, REQUEST)
        assert damage.errors.shape == (3, len(damage.features))
        assert damage.errors == pytest.approx(share, abs=1e-6)
        errors.append(image_error(damage.images, original.images))
    assert errors[0] == 0
    assert 0 < errors[1] < errors[2]
    after = draw(floating, REQUEST)
    assert np.array_equal(after.images, original.images), "the float network was left changed"


def test_the_features_are_those_of_the_packed_model():
    """Each error is that of the temporal block run alone, without the rest of the network."""
    source, packed = packed_pair.pair("minmax", 4)
    theirs = sampling.denoiser(sampling.load_pipeline(packed))
    pipe = sampling.load_pipeline(source)
    model = sampling.denoiser(pipe)
    adapter = adapt(model, sampling.example_inputs(pipe))
    damage = temporal_damage(pipe, theirs, adapter, REQUEST)
    timesteps = find_clock(theirs).timesteps
    assert damage.timesteps == timesteps.tolist()
    rows = [{"timestep": timestep.float()} for timestep in timesteps]
    sizes = []
    for unit in adapter.temporal():
        sizes += [each.norm(dim=1) for each in TemporalFeatures(adapter, unit, rows)(model)]
    alone = temporal_errors(adapter, model, theirs).sqrt() / torch.stack(sizes, 1)
    assert alone.min() > 0
    assert damage.errors == pytest.approx(alone.detach().numpy(), rel=1e-3)


@pytest.mark.parametrize("name", ["digits-cond", "dit"])
def test_features_that_read_a_label_are_compared_too(name):
    pipe = sampling.load_pipeline(f"zoo:{name}")
    request = sampling.Request(steps=2, seeds=(0, 1), labels=(1, 2), batch=2)
    original = draw(pipe, request)
    adapter = adapt(sampling.denoiser(pipe), original.calls[0].arguments)
    other = sampling.denoiser(sampling.load_pipeline(f"zoo:{name}"))
    damage = temporal_damage(pipe, other, adapter, request)
    assert damage.mean == 0
    assert np.array_equal(damage.images, original.images)
