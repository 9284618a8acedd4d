"""The request cache: the same images, one run of the temporal layers, and never a stale value."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import tiny_pipelines
import torch
from torch import nn

import lowtide
from lowtide import runtime, sampling
from lowtide.nn.request_cache import PerRequest, same_conditions

STEPS = 4


@pytest.fixture(params=["dit", "sdxl", "sd3", "flux"])
def quantized(request, tmp_path):
    pipe = tiny_pipelines.PIPELINES[request.param](tmp_path)
    conditions = tiny_pipelines.request_fields(request.param)
    options = {"steps": STEPS, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
    result = lowtide.quantize(pipe, method="temporal_cache", **options, **conditions)
    # A program keeps features by itself and asks the cache once a step.
    with lowtide.unfused(result):
        yield result, sampling.Request(steps=STEPS, seeds=(0, 1), **conditions)


def wrapped(model: nn.Module) -> list[PerRequest]:
    return [module for module in model.modules() if isinstance(module, PerRequest)]


def counted(result, request) -> tuple[np.ndarray, int]:
    """Images, and how often the first wrapped layer ran."""
    calls: list[int] = []
    hook = wrapped(result.model)[0].layer.register_forward_hook(
        lambda module, args, answer: calls.append(len(args[0]))
    )
    images = sampling.images(result.pipe, request)
    hook.remove()
    return images, len(calls)


def without_cache(result, request) -> np.ndarray:
    for module in wrapped(result.model):
        module.cache.building = True
    images = sampling.images(result.pipe, request)
    for module in wrapped(result.model):
        module.cache.building = False
    return images


def test_the_layers_run_once_and_images_stay(quantized, tmp_path):
    result, request = quantized
    assert wrapped(result.model)
    images, runs = counted(result, request)
    assert runs == 1
    plain = without_cache(result, request)
    assert np.linalg.norm(images - plain) / np.linalg.norm(plain) < 1e-4
    again, runs = counted(result, request)
    assert runs == 0  # the same request
    assert (again == images).all()
    other = replace(request, seeds=(1, 2))
    assert counted(result, other)[1] == 1  # other labels or prompts: another request
    result.save(tmp_path / "packed")
    loaded = sampling.images(lowtide.load(tmp_path / "packed", fused=False), request)
    assert (loaded == images).all()


def test_an_unknown_value_is_computed(quantized):
    result, request = quantized
    sampling.images(result.pipe, request)
    cache = wrapped(result.model)[0].cache
    first, second = list(cache.steps)[:2]
    assert cache.step_of([second, second]) == 1
    assert cache.step_of([second + 0.1]) is None
    assert cache.step_of([first, second]) is None


def test_a_request_on_another_device_is_another_request():
    """A pipeline that moved keeps the conditions of its cache on the old device."""
    here = {"text": torch.ones(2, 3), "label": torch.tensor([1, 2])}
    away = here | {"text": torch.ones(2, 3, device="meta")}
    assert same_conditions(here, {name: value.clone() for name, value in here.items()})
    assert not same_conditions(here, away) and not same_conditions(away, here)
    assert not same_conditions(here, here | {"text": torch.ones(2, 3, dtype=torch.float64)})
    assert not same_conditions(here, here | {"label": torch.tensor([1, 3])})


def test_conditions_on_another_device_are_computed_again(tmp_path):
    options = {"steps": STEPS, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
    result = lowtide.quantize(
        tiny_pipelines.dit(tmp_path), method="temporal_cache", labels=(1, 2), **options
    )
    runtime.unfuse(result.model)
    request = sampling.Request(steps=STEPS, seeds=(0, 1), labels=(1, 2))
    before = sampling.images(result.pipe, request)
    cache = wrapped(result.model)[0].cache
    (known,) = cache.requests
    away = {name: value.to("meta") for name, value in known.conditions.items()}
    cache.requests = [known._replace(conditions=away)]
    images, runs = counted(result, request)
    assert runs == 1
    assert (images == before).all()


def test_alternating_branches_are_each_built_once(tmp_path):
    """A pipeline may call its denoiser once for each branch of guidance.

    A third request replaces the one that was not used for longest.
    """
    options = {"steps": STEPS, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
    result = lowtide.quantize(
        tiny_pipelines.dit(tmp_path), method="temporal_cache", labels=(1, 2), **options
    )
    cache = wrapped(result.model)[0].cache
    built = []
    build = cache.build

    def count_and_build(conditions, timestep):
        built.append(conditions)
        return build(conditions, timestep)

    cache.build = count_and_build
    x = torch.randn(1, result.model.config.in_channels, *[result.model.config.sample_size] * 2)

    def answer(label: int, step: float) -> torch.Tensor:
        with torch.no_grad():
            return result.model(
                x, timestep=torch.tensor([step]), class_labels=torch.tensor([label])
            )[0]

    calls = list(product(cache.steps, (1, 2)))
    first = {(label, step): answer(label, step) for step, label in calls}
    assert len(built) == 2
    assert all(torch.equal(answer(*key), before) for key, before in first.items())
    assert len(built) == 2
    step = next(iter(cache.steps))
    for label in (2, 3, 2):
        answer(label, step)
    assert len(built) == 3
    assert torch.equal(answer(1, step), first[1, step]) and len(built) == 4
