"""Samplers by name and spacing: the right scheduler, the right pipeline, kept in the checkpoint."""

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.estimate.blueprint import read
from lowtide.sampling import Request, scheduled
from lowtide.sampling.pipelines import UnconditionalPipeline
from lowtide.sampling.quadratic_ddim import QuadraticDDIMScheduler
from lowtide.sampling.schedulers import SAMPLERS
from lowtide.sampling.variance_calibration import stochastic_part
from lowtide.settings import Settings
from lowtide.workflows import recipe_files

FAST = {"images": 2, "iters": 1, "calibration_steps": 2}


def apart(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


@torch.no_grad()
def ddim_by_its_own_code(unet, steps: int, eta: float = 0.0) -> np.ndarray:
    """runners/diffusion.py and functions/denoising.py of DDIM, with skip_type quad."""
    betas = torch.linspace(0.0001, 0.02, 1000)
    alphas = torch.cat([torch.ones(1), (1 - betas).cumprod(0)])  # alphas[t + 1]
    seq = [int(s) for s in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1, 3, 8, 8, generator=generator)
    for i, j in zip(reversed(seq), reversed([-1, *seq[:-1]]), strict=True):
        eps = unet(x, i).sample
        at = alphas[i + 1]
        following = alphas[j + 1]
        x0 = (x - eps * (1 - at).sqrt()) / at.sqrt()
        c1 = eta * ((1 - at / following) * (1 - following) / (1 - at)).sqrt()
        c2 = ((1 - following) - c1**2).sqrt()
        noise = torch.randn(1, 3, 8, 8, generator=generator) if eta and i != j else 0
        x = following.sqrt() * x0 + c1 * noise + c2 * eps
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("steps", "eta"), [(5, 0.0), (40, 0.0), (5, 1.0), (40, 1.0)])
def test_quadratic_spacing_is_that_of_ddims_own_code(steps, eta):
    unet = tiny.model("unet2d")
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False))
    request = Request(steps=steps, seeds=(7,), scheduler="ddim", spacing="quadratic", eta=eta)
    found = sampling.images(pipe, request)
    assert apart(found, ddim_by_its_own_code(unet, steps, eta)) < 1e-4
    uniform = sampling.images(pipe, Request(steps=steps, seeds=(7,), eta=eta))
    assert apart(uniform, found) > 1e-3


def test_quadratic_timesteps_and_their_order():
    scheduler = QuadraticDDIMScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [800, 450, 200, 50, 0]
    assert [scheduler.previous_timestep(t) for t in (800, 50, 0)] == [450, 0, -1]
    scheduler.set_timesteps(100)
    assert len(set(scheduler.timesteps.tolist())) == len(scheduler.timesteps) == 96


def test_the_noise_of_quadratic_steps_is_known_to_ptqd():
    scheduler = QuadraticDDIMScheduler()
    scheduler.set_timesteps(5)
    alphas = scheduler.alphas_cumprod
    sigma, _ = stochastic_part(scheduler, 450, eta=1.0)
    at = alphas[450]
    following = alphas[200]
    assert sigma == pytest.approx(
        float(((1 - following) / (1 - at) * (1 - at / following)).sqrt()), rel=1e-4
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_latent_pipeline_takes_every_sampler(name, tmp_path):
    pipe = tiny_pipelines.ldm(tmp_path)
    other = scheduled(pipe, name)
    assert type(other) is type(pipe) and other.unet is pipe.unet
    assert type(other.scheduler).__name__ == SAMPLERS[name].kind
    assert type(pipe.scheduler) is DDIMScheduler
    images = sampling.images(pipe, Request(steps=5, seeds=(1,), scheduler=name))
    assert np.array_equal(images, sampling.images(other, Request(steps=5, seeds=(1,))))
    if name != "ddim":
        assert apart(images, sampling.images(pipe, Request(steps=5, seeds=(1,)))) > 1e-4


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_bare_unet_takes_every_sampler(name):
    """The same samples as a loop that scales the sample as each scheduler asks for."""
    pipe = DDPMPipeline(tiny.model("unet2d"), DDIMScheduler(clip_sample=False))
    found = sampling.images(pipe, Request(steps=6, seeds=(3,), scheduler=name))
    scheduler = scheduled(pipe, name).scheduler
    scheduler.set_timesteps(6)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(1, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if sampling.pipelines.takes_generator(scheduler) else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            eps = pipe.unet(scheduler.scale_model_input(x, t), t).sample
            x = scheduler.step(eps, t, x, **options).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert apart(found, expected) < 1e-5


def test_the_pipeline_of_a_bare_unet_fits_its_scheduler():
    pipe = DDPMPipeline(tiny.model("unet2d"), DDIMScheduler())
    kinds = {name: type(scheduled(pipe, name)) for name in ("ddim", "ddpm", "euler")}
    assert kinds == {"ddim": DDIMPipeline, "ddpm": DDPMPipeline, "euler": UnconditionalPipeline}
    assert type(scheduled(scheduled(pipe, "euler"), "ddim")) is DDIMPipeline
    assert type(scheduled(pipe, None, "quadratic")) is UnconditionalPipeline


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spacing_is_the_schedulers_own(spacing, tmp_path):
    pipe = tiny_pipelines.ldm(tmp_path)
    found = sampling.timesteps(pipe, Request(steps=4, spacing=spacing))
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)
    scheduler.set_timesteps(4)
    assert found == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        ("ddim", {"scheduler": "dpmsolver++", "spacing": "trailing"}),
        ("ddim", {"scheduler": "ddim", "spacing": "quadratic"}),
        ("ddpm", {"scheduler": "heun"}),
        ("ldm", {"spacing": "quadratic"}),
        ("dit", {"scheduler": "unipc"}),
        ("sd", {"scheduler": "pndm"}),
        ("sd", {"scheduler": "ddim", "spacing": "quadratic"}),
    ],
    ids=str,
)
def test_the_checkpoint_keeps_the_sampler(pipeline, options, tmp_path):
    pipe = tiny_pipelines.PIPELINES[pipeline](tmp_path)
    fields = tiny_pipelines.request_fields(pipeline)
    result = lowtide.quantize(pipe, method="tfmq", steps=5, **FAST, **options, **fields)
    request = Request(steps=5, seeds=(1,), **fields)
    drawn = sampling.images(result.pipe, request)
    again = lowtide.load(result.save(tmp_path / "packed"))
    assert type(again) is type(result.pipe)
    assert type(again.scheduler) is type(result.pipe.scheduler)
    assert np.array_equal(sampling.images(again, request), drawn)
    visited = {round(t) for t in sampling.timesteps(again, request)}
    assert visited == set(result.plan.timesteps)
    # Heun's timesteps are those of linspace.
    other = "leading" if options.get("scheduler") == "heun" else "linspace"
    asked = Request(steps=5, seeds=(1,), scheduler="ddim", spacing=other, **fields)
    with pytest.warns(UserWarning, match="timesteps"):
        moved = sampling.images(again, asked)
    assert np.isfinite(moved).all() and not np.array_equal(moved, drawn)


@pytest.mark.parametrize(
    "options", [{"scheduler": "heun"}, {"spacing": "quadratic"}, {"scheduler": "pndm"}], ids=str
)
def test_plan_knows_the_calls_of_a_sampler(options, tmp_path):
    pipe = tiny_pipelines.ddim(tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    predicted = read(str(tmp_path / "float")).timesteps(Settings(steps=30, **options))
    assert predicted == sampling.timesteps(pipe, Request(steps=30, **options))


WRONG = [
    (
        "dit",
        {"scheduler": "euler"},
        "found scheduler euler for a DiTPipeline, which does not scale",
    ),
    ("sd3", {"scheduler": "ddim"}, "found scheduler ddim for a model with a FlowMatchEuler"),
    ("sd3", {"spacing": "trailing"}, "found spacing trailing for a model with a FlowMatchEuler"),
    ("ldm", {"scheduler": "euler", "spacing": "quadratic"}, "found spacing quadratic with euler"),
    ("ldm", {"scheduler": "ddim", "eta": 2.0}, "found eta"),
    ("ldm", {"scheduler": "ddimm"}, "found scheduler 'ddimm'; expected ddim or ddpm"),
    ("ldm", {"spacing": "cubic"}, "found spacing 'cubic'; expected leading or trailing"),
    ("ldm", {"scheduler": "euler", "eta": 1.0}, "found eta 1 for a LDMPipeline with a Euler"),
]


@pytest.mark.parametrize(("pipeline", "options", "message"), WRONG, ids=str)
def test_what_a_pipeline_cannot_do_is_one_sentence(pipeline, options, message, tmp_path):
    pipe = tiny_pipelines.PIPELINES[pipeline](tmp_path)
    fields = tiny_pipelines.request_fields(pipeline)
    with pytest.raises(BadInput, match=message):
        sampling.images(pipe, Request(steps=4, **fields, **options))


def test_quantizing_changes_the_users_pipeline_in_place(tmp_path):
    pipe = tiny_pipelines.ldm(tmp_path)
    result = lowtide.quantize(pipe, method="minmax", steps=2, scheduler="euler", **FAST_ONLY)
    assert result.pipe is pipe and type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"


FAST_ONLY = {"images": 2}


def test_both_models_of_a_comparison_take_the_recorded_sampler(tmp_path):
    from lowtide.workflows.to_folder import quantize_to_folder

    tiny_pipelines.ddim(tmp_path).save_pretrained(tmp_path / "float")
    options = {"steps": 4, "images": 2, "scheduler": "dpmsolver++", "spacing": "trailing"}
    quantize_to_folder(str(tmp_path / "float"), tmp_path / "packed", "minmax", options)
    result = lowtide.evaluate(tmp_path / "packed", seeds=(1, 2))
    assert result.evidence.request.scheduler == "DPMSolverMultistepScheduler"
    _, packed = result.evidence.models.values()
    assert packed.psnr > 10


def test_a_recipe_file_names_a_sampler(tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(
        'model = "x"\nmethod = "tfmq"\n[settings]\nscheduler = "pndm"\nspacing = "leading"\n'
    )
    recipe = recipe_files.read(path)
    assert recipe.options(recipe.row(None)) == {"scheduler": "pndm", "spacing": "leading"}


def test_diffusers_alone_loads_a_quadratic_latent_pipeline(tmp_path):
    result = lowtide.quantize(
        tiny_pipelines.ldm(tmp_path), method="minmax", steps=3, spacing="quadratic", images=2
    )
    pipe = DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed"))
    assert type(pipe.scheduler) is QuadraticDDIMScheduler
