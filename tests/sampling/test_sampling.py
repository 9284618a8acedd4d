"""The trajectory is the pipeline's own, image k depends on seed k alone, for every scheduler."""

import inspect
from dataclasses import replace

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.sampling import Request

SCHEDULERS = [
    DDIMScheduler,
    DDPMScheduler,
    PNDMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
]


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def apart(actual: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def case(request, tmp_path_factory):
    pipe = tiny_pipelines.PIPELINES[request.param](tmp_path_factory.mktemp(request.param))
    return pipe, tiny_pipelines.request_fields(request.param)


def own_call(pipe, fields: dict) -> np.ndarray:
    """The pipeline called as its own documentation says, with the fields of the request."""
    call = {"num_inference_steps": 3, "generator": generators(5, 6), "output_type": "np"}
    if "labels" in fields:
        call["class_labels"] = [fields["labels"][5 % 3], fields["labels"][6 % 3]]
    elif "prompts" in fields:
        call |= {"prompt": [fields["prompts"][1], fields["prompts"][0]], "height": 16, "width": 16}
        if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
            call["use_resolution_binning"] = False
    else:
        call["batch_size"] = 2
    with torch.no_grad():
        return np.asarray(pipe(**call).images)


def test_our_images_are_the_pipelines_own(case):
    pipe, fields = case
    ours = sampling.images(pipe, Request(steps=3, seeds=(5, 6), batch=2, **fields))
    assert np.array_equal(ours, own_call(pipe, fields))


def test_an_image_alone_is_the_image_in_a_batch(case):
    pipe, fields = case
    together = sampling.images(pipe, Request(steps=3, seeds=(5, 6, 7), batch=3, **fields))
    alone = sampling.images(pipe, Request(steps=3, seeds=(6,), **fields))
    # Not bit for bit: a matrix product of another size sums in another order.
    assert apart(together[1], alone[0]) < 1e-5
    assert apart(together[0], alone[0]) > 1e-2


def test_moments_replayed_give_the_same_answers(case):
    pipe, fields = case
    model = sampling.denoiser(pipe)
    moments = list(sampling.trajectory(pipe, Request(steps=3, seeds=(5, 6), batch=2, **fields)))
    assert len(moments) == 3
    for moment in moments:
        with torch.no_grad():
            again = model(**moment.arguments | {"return_dict": False})[0]
        assert (again - moment.eps).norm() / moment.eps.norm() < 1e-5
        assert len(moment.t) == len(again)


def test_guidance_doubles_the_batch(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    request = Request(steps=2, seeds=(1, 2), prompts=("a",), size=16)
    for guidance, samples in ((1.0, 2), (7.5, 4)):
        moment = next(sampling.trajectory(pipe, replace(request, guidance=guidance)))
        assert len(moment.eps) == samples


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_every_scheduler_samples_and_quantizes(kind, tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    fields = {"prompts": ("a b",), "size": 16}
    moments = list(sampling.trajectory(pipe, Request(steps=5, seeds=(1,), **fields)))
    timesteps = [float(moment.t[0]) for moment in moments]
    assert timesteps == pipe.scheduler.timesteps.tolist()
    assert len(moments) == (14 if kind is PNDMScheduler else 5)
    result = lowtide.quantize(
        pipe, method="tfmq", steps=5, images=2, calibration_steps=2, iters=1, **fields
    )
    assert set(result.plan.timesteps) == {round(float(t)) for t in pipe.scheduler.timesteps}
    assert np.isfinite(sampling.images(pipe, Request(steps=5, seeds=(3,), **fields))).all()


def noisy(pipe, kind=DDPMScheduler, **changes):
    pipe.scheduler = kind.from_config(pipe.scheduler.config, **changes)
    return pipe


STOCHASTIC = {
    "ldm": (DDPMScheduler, {}),
    "dit": (DDPMScheduler, {}),
    "sd": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "sd3": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
    "flux": (FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_noisy_scheduler_draws_from_the_images_own_seed(name, tmp_path):
    kind, changes = STOCHASTIC[name]
    pipe = noisy(tiny_pipelines.PIPELINES[name](tmp_path), kind, **changes)
    fields = tiny_pipelines.request_fields(name)
    together = sampling.images(pipe, Request(steps=3, seeds=(5, 6, 7), batch=3, **fields))
    alone = sampling.images(pipe, Request(steps=3, seeds=(6,), **fields))
    assert apart(together[1], alone[0]) < 1e-5
    assert "step" not in vars(pipe.scheduler)


ETA = {
    "ddim": tiny_pipelines.ddim,
    "ldm": tiny_pipelines.ldm,
    "sd": tiny_pipelines.stable_diffusion,
}


@pytest.mark.parametrize("name", ETA)
def test_eta_adds_noise_of_the_images_own_seed(name, tmp_path):
    pipe = ETA[name](tmp_path)
    one = Request(steps=3, seeds=(6,), **tiny_pipelines.request_fields(name))
    three = replace(one, seeds=(5, 6, 7), eta=1.0, batch=3)
    together = sampling.images(pipe, three)
    alone = sampling.images(pipe, replace(one, eta=1.0))
    calm = sampling.images(pipe, replace(one, eta=0.0))
    assert np.array_equal(together, sampling.images(pipe, three))
    assert apart(together[1], alone[0]) < 1e-5
    assert np.array_equal(calm, sampling.images(pipe, one))
    assert apart(alone, calm) > 1e-2


NO_LABELS = "found labels for a DDIMPipeline; .* takes nothing of the kind; leave --labels away"
NO_WORDS = "found labels for a StableDiffusionPipeline; .* takes prompts and guidance"


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("ddim", {"labels": (3,)}, NO_LABELS),
        ("ddim", {"prompts": ("a",)}, "found prompts for a DDIMPipeline"),
        ("ddim", {"guidance": 3.0}, "found guidance for a DDIMPipeline"),
        ("ddim", {"size": 16}, "found size for a DDIMPipeline"),
        ("sd", {"labels": (1,), "size": 16}, NO_WORDS),
        ("dit", {"prompts": ("a",), "labels": (1,)}, "found prompts for a DiTPipeline"),
    ],
)
def test_what_a_pipeline_does_not_support_is_refused(kind, fields, words, tmp_path):
    with pytest.raises(BadInput, match=words):
        sampling.images(tiny_pipelines.PIPELINES[kind](tmp_path), Request(steps=3, **fields))


def test_eta_is_for_ddim(tmp_path):
    request = Request(steps=4, prompts=("a",), size=16, eta=0.5)
    words = r"found eta 0\.5 for a StableDiffusion3Pipeline with a FlowMatchEuler"
    with pytest.raises(BadInput, match=words):
        sampling.images(tiny_pipelines.sd3(tmp_path), request)
    pndm = noisy(tiny_pipelines.stable_diffusion(tmp_path), PNDMScheduler)
    words = r"found eta 0\.5 for a StableDiffusionPipeline with a PNDMScheduler; expected .* DDIM's"
    with pytest.raises(BadInput, match=words):
        sampling.images(pndm, request)


class Plain(torch.nn.Module):
    """A denoiser that no Architecture describes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(sample)


@pytest.mark.parametrize(
    "kind", [*SCHEDULERS, FlowMatchEulerDiscreteScheduler], ids=lambda kind: kind.__name__
)
def test_any_module_goes_the_same_way(kind):
    pipe = sampling.as_pipeline(Plain(), kind(), (3, 8, 8))
    together = sampling.images(pipe, Request(steps=5, seeds=(5, 6, 7), batch=3))
    assert together.shape == (3, 8, 8, 3) and together.min() >= 0 and together.max() <= 1
    assert apart(together[1], sampling.images(pipe, Request(steps=5, seeds=(6,)))[0]) < 1e-5
    timesteps = sampling.timesteps(pipe, Request(steps=5))
    assert timesteps == pipe.scheduler.timesteps.tolist()


def test_a_module_called_directly_draws_the_same():
    pipe = sampling.ModulePipeline(Plain(), DDPMScheduler(), (3, 8, 8))
    direct = pipe(
        batch_size=2, generator=generators(5, 6), num_inference_steps=3, output_type="np"
    ).images
    assert np.array_equal(direct, sampling.images(pipe, Request(steps=3, seeds=(5, 6))))


def test_a_module_in_ddim_is_diffusers_ddim():
    model = tiny.model("unet2d")
    shape = (model.config.in_channels, model.config.sample_size, model.config.sample_size)
    ours = sampling.ModulePipeline(model, DDIMScheduler(), shape)
    theirs = DDIMPipeline(model, DDIMScheduler())
    request = Request(steps=3, seeds=(5, 6))
    assert apart(sampling.images(ours, request), sampling.images(theirs, request)) < 1e-6


def test_only_the_requested_steps_are_kept():
    pipe = DDIMPipeline(tiny.model("unet2d"), DDIMScheduler())
    request = Request(steps=4, seeds=(1, 2, 3), batch=2)
    some = list(sampling.trajectory(pipe, request, keep={0, 3}))
    every = list(sampling.trajectory(pipe, request))
    assert [(moment.index, len(moment.t)) for moment in some] == [(0, 2), (3, 2), (0, 1), (3, 1)]
    expected = [every[place] for place in (0, 3, 4, 7)]
    assert all(torch.equal(a.eps, b.eps) for a, b in zip(some, expected, strict=True))


def test_timesteps_are_what_the_denoiser_sees(tmp_path):
    pipe = tiny_pipelines.flux(tmp_path)
    request = Request(steps=3, seeds=(1, 2), prompts=("a",), size=16)
    timesteps = sampling.timesteps(pipe, request)
    expected = [float(t) / 1000 for t in pipe.scheduler.timesteps]
    assert timesteps == pytest.approx(expected, rel=1e-6)


def test_flow_matching_steps_are_distinct(tmp_path):
    pipe = tiny_pipelines.flux(tmp_path)
    assert isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    result = lowtide.quantize(
        pipe,
        method="tfmq",
        steps=4,
        images=1,
        calibration_steps=1,
        iters=1,
        prompts=("a",),
        size=16,
    )
    assert len(result.plan.timesteps) == 4
    assert result.plan.timesteps == tuple(round(float(t)) for t in pipe.scheduler.timesteps)


def test_bars_are_as_they_were():
    pipe = DDIMPipeline(tiny.model("unet2d"), DDIMScheduler())
    pipe.set_progress_bar_config(desc="mine", disable=True)
    sampling.images(pipe, Request(steps=1, seeds=(1,)))
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


def test_steps_that_a_scheduler_cannot_take():
    with pytest.raises(BadInput, match="found 1001 steps; expected at most 1000"):
        sampling.images(DDIMPipeline(tiny.model("unet2d"), DDIMScheduler()), Request(steps=1001))
    pndm = sampling.ModulePipeline(tiny.model("unet2d"), PNDMScheduler(), (3, 16, 16))
    with pytest.raises(BadInput, match="found 3 steps for PNDMScheduler; expected at least 4"):
        sampling.images(pndm, Request(steps=3))


def test_a_class_conditional_model_asks_for_labels(tmp_path):
    with pytest.raises(BadInput, match="no labels"):
        sampling.images(tiny_pipelines.dit(tmp_path), Request(steps=1))
    with pytest.raises(BadInput, match="found label 1000; expected 0 to 999"):
        sampling.images(tiny_pipelines.dit(tmp_path), Request(steps=1, labels=(1000,)))


def test_an_unknown_pipeline_lists_the_known():
    class MyPipeline(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        def __call__(self, steps):
            raise AssertionError("called")

    with pytest.raises(BadInput, match=r"found a MyPipeline .*; expected one of DDPMPipeline"):
        sampling.images(MyPipeline(tiny.model("unet2d"), DDIMScheduler()), Request(steps=1))


class Censor(torch.nn.Module):
    """A safety checker that objects to everything."""

    device = torch.device("cpu")
    dtype = torch.float32

    def forward(self, images, clip_input):
        return torch.zeros_like(images), [True] * len(images)


def test_a_safety_checker_stays_and_is_noted(tmp_path, monkeypatch):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    request = Request(steps=1, prompts=("a",), size=16)
    pipe.register_modules(safety_checker=Censor())
    monkeypatch.setattr(
        pipe, "run_safety_checker", lambda image, device, dtype: pipe.safety_checker(image, None)
    )
    with pytest.warns(UserWarning, match="safety checker may answer with black images"):
        assert sampling.images(pipe, request).max() < 1
    assert isinstance(pipe.safety_checker, Censor)
