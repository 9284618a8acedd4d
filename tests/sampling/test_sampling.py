"""The trajectory is diffusers' own pipeline, image k depends on seed k alone, and every scheduler goes the same way."""

import inspect

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
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


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.fixture(scope="module", params=tiny_pipelines.PIPELINES)
def case(request, tmp_path_factory):
    pipe = tiny_pipelines.PIPELINES[request.param](tmp_path_factory.mktemp(request.param))
    return pipe, tiny_pipelines.asked(request.param)


def own_call(pipe, asked: dict) -> np.ndarray:
    """The pipeline called as its own documentation says, with the words of the request."""
    call = {"num_inference_steps": 3, "generator": generators(5, 6), "output_type": "np"}
    if "labels" in asked:
        call["class_labels"] = [asked["labels"][5 % 3], asked["labels"][6 % 3]]
    elif "prompts" in asked:
        call |= {"prompt": [asked["prompts"][1], asked["prompts"][0]], "height": 16, "width": 16}
        if "use_resolution_binning" in inspect.signature(pipe.__call__).parameters:
            call["use_resolution_binning"] = False
    else:
        call["batch_size"] = 2
    with torch.no_grad():
        return np.asarray(pipe(**call).images)


def test_our_images_are_the_pipelines_own(case):
    pipe, asked = case
    assert np.array_equal(
        sampling.images(pipe, Request(steps=3, seeds=(5, 6), batch=2, **asked)),
        own_call(pipe, asked),
    )


def test_an_image_alone_is_the_image_in_a_batch(case):
    pipe, asked = case
    together = sampling.images(pipe, Request(steps=3, seeds=(5, 6, 7), batch=3, **asked))
    alone = sampling.images(pipe, Request(steps=3, seeds=(6,), **asked))
    # Not bit for bit: a matrix product of another size sums in another order.
    assert apart(together[1], alone[0]) < 1e-5
    assert apart(together[0], alone[0]) > 1e-2


def test_moments_replayed_give_the_same_answers(case):
    pipe, asked = case
    model = sampling.denoiser(pipe)
    moments = list(sampling.trajectory(pipe, Request(steps=3, seeds=(5, 6), batch=2, **asked)))
    assert len(moments) == 3
    for moment in moments:
        with torch.no_grad():
            again = model(**moment.arguments | {"return_dict": False})[0]
        assert (again - moment.eps).norm() / moment.eps.norm() < 1e-5
        assert len(moment.t) == len(again)


def test_guidance_doubles_the_batch(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    asked = Request(steps=2, seeds=(1, 2), prompts=("a",), size=16)
    sizes = {
        guidance: len(next(iter(sampling.trajectory(pipe, with_(asked, guidance)))).eps)
        for guidance in (1.0, 7.5)
    }
    assert sizes == {1.0: 2, 7.5: 4}


def with_(request: Request, guidance: float) -> Request:
    return Request(
        request.steps, request.seeds, request.prompts, guidance=guidance, size=request.size
    )


@pytest.mark.parametrize("kind", SCHEDULERS, ids=lambda kind: kind.__name__)
def test_every_scheduler_samples_and_quantizes(kind, tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    asked = {"prompts": ("a b",), "size": 16}
    moments = list(sampling.trajectory(pipe, Request(steps=5, seeds=(1,), **asked)))
    assert [float(moment.t[0]) for moment in moments] == [
        float(t) for t in pipe.scheduler.timesteps
    ]
    assert len(moments) == (14 if kind is PNDMScheduler else 5)
    result = lowtide.quantize(
        pipe, method="tfmq", steps=5, images=2, calibration_steps=2, iters=1, **asked
    )
    assert set(result.plan.timesteps) == {round(float(t)) for t in pipe.scheduler.timesteps}
    assert np.isfinite(sampling.images(pipe, Request(steps=5, seeds=(3,), **asked))).all()


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
    pipe, asked = (
        noisy(tiny_pipelines.PIPELINES[name](tmp_path), kind, **changes),
        tiny_pipelines.asked(name),
    )
    together = sampling.images(pipe, Request(steps=3, seeds=(5, 6, 7), batch=3, **asked))
    alone = sampling.images(pipe, Request(steps=3, seeds=(6,), **asked))
    assert apart(together[1], alone[0]) < 1e-5
    assert "step" not in vars(pipe.scheduler)


ETA = {
    "ddim": tiny_pipelines.ddim,
    "ldm": tiny_pipelines.ldm,
    "sd": tiny_pipelines.stable_diffusion,
}


@pytest.mark.parametrize("name", ETA)
def test_eta_adds_noise_of_the_images_own_seed(name, tmp_path):
    pipe, asked = ETA[name](tmp_path), tiny_pipelines.asked(name)
    together, same = (
        sampling.images(pipe, Request(steps=3, seeds=(5, 6, 7), batch=3, eta=1.0, **asked))
        for _ in range(2)
    )
    alone = sampling.images(pipe, Request(steps=3, seeds=(6,), eta=1.0, **asked))
    assert np.array_equal(together, same) and apart(together[1], alone[0]) < 1e-5
    calm, default = (
        sampling.images(pipe, Request(steps=3, seeds=(6,), eta=eta, **asked)) for eta in (0.0, None)
    )
    assert np.array_equal(calm, default) and apart(alone, calm) > 1e-2


@pytest.mark.parametrize(
    ("kind", "asked", "takes"),
    [
        (
            "ddim",
            {"labels": (3,)},
            "found labels for a DDIMPipeline; .* takes nothing of the kind; leave --labels away",
        ),
        ("ddim", {"prompts": ("a",)}, "found prompts for a DDIMPipeline"),
        ("ddim", {"guidance": 3.0}, "found guidance for a DDIMPipeline"),
        ("ddim", {"size": 16}, "found size for a DDIMPipeline"),
        (
            "sd",
            {"labels": (1,), "size": 16},
            "found labels for a StableDiffusionPipeline; .* takes prompts and guidance",
        ),
        ("dit", {"prompts": ("a",), "labels": (1,)}, "found prompts for a DiTPipeline"),
    ],
)
def test_what_a_pipeline_would_not_hear_of_is_refused(kind, asked, takes, tmp_path):
    with pytest.raises(BadInput, match=takes):
        sampling.images(tiny_pipelines.PIPELINES[kind](tmp_path), Request(steps=3, **asked))


def test_eta_is_for_ddim(tmp_path):
    asked = Request(steps=4, prompts=("a",), size=16, eta=0.5)
    with pytest.raises(
        BadInput, match=r"found eta 0\.5 for a StableDiffusion3Pipeline with a FlowMatchEuler"
    ):
        sampling.images(tiny_pipelines.sd3(tmp_path), asked)
    with pytest.raises(
        BadInput,
        match=r"found eta 0\.5 for a StableDiffusionPipeline with a PNDMScheduler; expected .* DDIM's",
    ):
        sampling.images(noisy(tiny_pipelines.stable_diffusion(tmp_path), PNDMScheduler), asked)


class Plain(torch.nn.Module):
    """A denoiser that is nobody's but its author's."""

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
    assert sampling.timesteps(pipe, Request(steps=5)) == [
        float(t) for t in pipe.scheduler.timesteps
    ]


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
    asked = Request(steps=3, seeds=(5, 6))
    assert (
        apart(
            sampling.images(ours, asked),
            sampling.images(DDIMPipeline(model, DDIMScheduler()), asked),
        )
        < 1e-6
    )


def test_only_the_steps_asked_for_are_kept():
    pipe, asked = (
        DDIMPipeline(tiny.model("unet2d"), DDIMScheduler()),
        Request(steps=4, seeds=(1, 2, 3), batch=2),
    )
    some, every = (
        list(sampling.trajectory(pipe, asked, keep={0, 3})),
        list(sampling.trajectory(pipe, asked)),
    )
    assert [(moment.index, len(moment.t)) for moment in some] == [(0, 2), (3, 2), (0, 1), (3, 1)]
    assert all(
        torch.equal(a.eps, b.eps)
        for a, b in zip(some, [every[i] for i in (0, 3, 4, 7)], strict=True)
    )


def test_timesteps_are_what_the_denoiser_sees(tmp_path):
    pipe = tiny_pipelines.flux(tmp_path)
    seen = sampling.timesteps(pipe, Request(steps=3, seeds=(1, 2), prompts=("a",), size=16))
    assert seen == pytest.approx([float(t) / 1000 for t in pipe.scheduler.timesteps], rel=1e-6)


def test_flow_matching_steps_are_told_apart(tmp_path):
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


def test_prompts_and_labels_follow_the_seed():
    asked = Request(seeds=(4, 5, 9), prompts=("zero", "one"))
    assert asked.dealt(asked.prompts) == ["zero", "one", "one"]
    assert [batch.seeds for batch in Request(seeds=tuple(range(5)), batch=2).batches()] == [
        (0, 1),
        (2, 3),
        (4,),
    ]


def test_bars_are_as_they_were():
    pipe = DDIMPipeline(tiny.model("unet2d"), DDIMScheduler())
    pipe.set_progress_bar_config(desc="mine", disable=True)
    sampling.images(pipe, Request(steps=1, seeds=(1,)))
    assert pipe._progress_bar_config == {"desc": "mine", "disable": True}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": ()}, "no seeds"),
        ({"steps": 0}, "steps 0"),
        ({"batch": 0}, "batch 0"),
        ({"eta": 1.5}, "eta 1.5; expected 0, .* to 1"),
    ],
)
def test_requests_that_cannot_be(wrong, words):
    with pytest.raises(BadInput, match=words):
        Request(**wrong)


def test_steps_that_a_scheduler_cannot_take():
    with pytest.raises(BadInput, match="found 1001 steps; expected at most 1000"):
        sampling.images(DDIMPipeline(tiny.model("unet2d"), DDIMScheduler()), Request(steps=1001))
    with pytest.raises(BadInput, match="found 3 steps for PNDMScheduler; expected at least 4"):
        sampling.images(
            sampling.ModulePipeline(tiny.model("unet2d"), PNDMScheduler(), (3, 16, 16)),
            Request(steps=3),
        )


def test_a_class_conditional_model_asks_for_labels(tmp_path):
    with pytest.raises(BadInput, match="no labels"):
        sampling.images(tiny_pipelines.dit(tmp_path), Request(steps=1))
    with pytest.raises(BadInput, match="found label 1000; expected 0 to 999"):
        sampling.images(tiny_pipelines.dit(tmp_path), Request(steps=1, labels=(1000,)))


def test_an_unknown_pipeline_lists_the_known():
    class MyPipeline(DDIMPipeline):
        pass

    with pytest.raises(BadInput, match="found MyPipeline; expected one of DDPMPipeline"):
        sampling.images(MyPipeline(tiny.model("unet2d"), DDIMScheduler()), Request(steps=1))


def test_a_bare_transformer_needs_its_pipeline():
    with pytest.raises(BadInput, match="bare DiTTransformer2DModel"):
        lowtide.quantize(tiny.model("dit"))


class Censor(torch.nn.Module):
    """A safety checker that objects to everything."""

    device, dtype = torch.device("cpu"), torch.float32

    def forward(self, images, clip_input):
        return torch.zeros_like(images), [True] * len(images)


def test_a_safety_checker_stays_and_is_noted(tmp_path, monkeypatch):
    pipe, asked = (
        tiny_pipelines.stable_diffusion(tmp_path),
        Request(steps=1, prompts=("a",), size=16),
    )
    pipe.register_modules(safety_checker=Censor())
    monkeypatch.setattr(
        pipe, "run_safety_checker", lambda image, device, dtype: pipe.safety_checker(image, None)
    )
    with pytest.warns(UserWarning, match="safety checker may answer with black images"):
        assert sampling.images(pipe, asked).max() < 1
    assert isinstance(pipe.safety_checker, Censor)


def saved(folder):
    DDIMPipeline(tiny.model("unet2d").half(), DDIMScheduler()).save_pretrained(folder)
    return folder


def test_half_precision_weights_are_loaded_as_float32(tmp_path):
    assert sampling.load_pipeline(saved(tmp_path)).unet.dtype == torch.float32
    assert sampling.load_pipeline(tmp_path / "unet").unet.dtype == torch.float32
    assert sampling.load_pipeline(tmp_path, torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["{oops", "[]", "{}"])
def test_a_config_that_names_no_model(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(BadInput, match="found no model"):
        sampling.load_pipeline(tmp_path)


def test_weights_that_are_cut_short_or_gone(tmp_path):
    weights = saved(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(BadInput, match="unreadable"):
        sampling.load_pipeline(tmp_path)
    weights.unlink()
    with pytest.raises(BadInput, match="unreadable"):
        sampling.load_pipeline(tmp_path)


def test_a_place_without_a_model(tmp_path):
    with pytest.raises(BadInput, match="found no folder"):
        sampling.load_pipeline(tmp_path / "nothing")
    with pytest.raises(BadInput, match="found a bare AutoencoderKL"):
        (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
        sampling.load_pipeline(tmp_path)


def test_no_prompt_in_the_file(tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="no prompt"):
        sampling.read_prompts(tmp_path / "empty.txt")
    assert len(sampling.read_prompts(None)) == 32
