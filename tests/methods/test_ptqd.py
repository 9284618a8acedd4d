"""PTQD: known noise is corrected, the rest is absorbed by the sampler; checkpoints keep both."""

from dataclasses import dataclass

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.formats import Stepped
from lowtide.methods import METHODS, ptqd, relevant_options
from lowtide.methods.ptqd import CNC, VSC, Bias, Moments, StepAware
from lowtide.nn.swap import find_clock
from lowtide.sampling import variance_calibration
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.pack import Pack

OPTIONS = {
    "weights": 4,
    "inputs": 8,
    "steps": 4,
    "images": 4,
    "calibration_steps": 2,
    "iters": 4,
    "range_iters": 2,
    "batch": 8,
}


@dataclass(frozen=True)
class Louder(Stage):
    """Scale the last layer's output by 1.1: noise that is correlated with the answer."""

    def run(self, job):
        last = job.model.conv_out
        last.grid = last.grid._replace(scale=1.1 * last.grid.scale)


@pytest.fixture(autouse=True)
def louder(monkeypatch):
    """PTQD on the minmax base, made louder: the error of a random model alone has no slope."""
    base = (Collect(), Assign(), FitWeights("minmax"), FitRanges("minmax"), Louder())
    monkeypatch.setitem(
        METHODS, "louder", lambda settings: (*base, StepAware(), CNC(), Bias(), VSC(), Pack())
    )


def quantized(method="ptqd", **options):
    without = options.pop("without", ())
    relevant = relevant_options(method, OPTIONS | options)
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    return lowtide.quantize(pipe, method=method, without=without, **relevant)


def moments_of(eps: torch.Tensor, noise: torch.Tensor) -> Moments:
    """steps x channels x values."""
    return Moments(*(each.mean(2) for each in (eps, noise, eps * eps, eps * noise, noise * noise)))


def test_moments_find_slope_bias_and_what_remains():
    draw = torch.Generator().manual_seed(0)
    eps, rest = (torch.randn(2, 3, 50_000, generator=draw, dtype=torch.double) for _ in range(2))
    slope = torch.tensor([0.2, -0.1]).reshape(2, 1, 1)
    bias = torch.tensor([0.3, 0.0, -0.3]).reshape(1, 3, 1)
    moments = moments_of(eps + 0.5, slope * (eps + 0.5) + bias + 0.05 * rest)
    assert torch.allclose(moments.slope(), slope.flatten().double(), atol=0.005)
    assert torch.allclose(moments.sigma(), torch.tensor([0.05, 0.05]).double(), atol=0.001)


def test_each_correction_lowers_the_error_on_the_answers_it_was_measured_on():
    summary = quantized("louder").report["ptqd"]
    assert summary["slope"] == pytest.approx([0.1] * OPTIONS["steps"], abs=0.05) and all(
        summary["sigma"]
    )
    assert summary["error before Bias"] < summary["error before CNC"]
    assert summary["error before VSC"] < summary["error before Bias"]


def test_the_mean_error_of_each_channel_is_gone_after_bias(monkeypatch):
    """By the paper's algebra; its code subtracts the correlated part twice."""
    noise: list[torch.Tensor] = []

    class LayerInputs(Bias):
        def run(self, job):
            super().run(job)
            noise.append(ptqd.measure(job).noise)

    recipe = [
        LayerInputs() if isinstance(stage, Bias) else stage
        for stage in METHODS["louder"](Settings())
    ]
    monkeypatch.setitem(METHODS, "watched", lambda settings: tuple(recipe))
    quantized("watched")
    assert noise[0].abs().max() < 1e-5


def test_left_out_is_the_ablation():
    bare = quantized("louder", without=("cnc", "bias", "vsc"))
    assert bare.plan.corrected == 0 and not hasattr(bare.model, variance_calibration.CORRECTION)
    only = quantized("louder", without=("bias", "vsc")).model.get_submodule(
        variance_calibration.CORRECTION
    )
    assert only.slope.all() and not only.bias.any() and not only.noise.any()


def test_sixteen_bits_change_nothing():
    original = tiny.model("unet2d")
    result = quantized(weights=16, inputs=32)
    x = torch.randn(2, 3, 8, 8)
    assert result.plan.corrected == 0
    assert torch.equal(result.model(x, 750)[0], original(x, 750)[0])


def test_fewer_bits_are_enough_where_the_sampler_is_noisy():
    summary = quantized().report["ptqd"]["bits by step"]
    assert set(summary.values()) <= {4, 6, 8} and len(summary) == OPTIONS["steps"]
    noisy = max(summary)
    clean = min(summary)
    assert summary[noisy] <= summary[clean]


def answers(scheduler, spread: float, draws: int = 4000) -> torch.Tensor:
    """The variance of x' over many draws, when the answer carries noise of that spread."""
    scheduler.set_timesteps(10)
    t = int(scheduler.timesteps[4])
    draw = torch.Generator().manual_seed(0)
    x = torch.zeros(draws, 1, 4, 4)
    eps = 0.1 + spread * torch.randn(x.shape, generator=draw)
    options = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    return scheduler.step(
        eps, t, x, generator=torch.Generator().manual_seed(1), **options
    ).prev_sample.var()


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
def test_with_noise_absorbed_a_step_is_as_noisy_as_the_sampler_asked(kind):
    """The whole point of the variance schedule: sigma'^2 + c^2 sigma_q^2 = sigma^2."""
    torch.manual_seed(0)
    spread = 0.05
    plain = answers(kind(clip_sample=False), 0.0)
    noisy = answers(kind(clip_sample=False), spread)

    class Known(torch.nn.Module):
        def remaining(self):
            return spread

    model = torch.nn.Module()
    scheduler = kind(clip_sample=False)
    model.add_module(variance_calibration.CORRECTION, Known())
    with variance_calibration.calibrated_variance(scheduler, model):
        absorbed = answers(scheduler, spread)
    assert noisy / plain > 1.001
    assert abs(absorbed / plain - 1) < 0.2 * abs(noisy / plain - 1)
    assert "step" not in vars(scheduler)


def test_a_sampler_without_noise_is_left_alone():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    assert variance_calibration.stochastic_part(scheduler, int(scheduler.timesteps[3]), 0.0)[0] == 0
    assert variance_calibration.remaining_share(0.0, 1.0, 0.5) == 1


def test_ddims_own_noise_absorbs_some_at_eta_1(tmp_path):
    result = quantized("louder", eta=1.0)
    summary = result.report["ptqd"]["absorbed"]
    assert len(summary) == OPTIONS["steps"] - 1 and all(
        0 < share <= 1 for share in summary.values()
    )  # the last step adds no noise
    request = sampling.Request(steps=4, seeds=(5, 6), batch=2, eta=1.0)
    ours = sampling.images(result.pipe, request)
    correction = result.model.get_submodule(variance_calibration.CORRECTION)
    loaded = DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed"))
    assert np.array_equal(sampling.images(loaded, request), ours)
    call = sampling.call_arguments(loaded, request)
    with variance_calibration.calibrated_variance(loaded.scheduler, loaded.unet):
        assert np.array_equal(loaded(**call).images, ours)
    plain = loaded(**sampling.call_arguments(loaded, request)).images
    correction.noise.zero_()
    assert np.array_equal(
        sampling.images(result.pipe, request), plain
    )  # diffusers alone absorbs nothing
    assert np.abs(plain - ours).max() > 1e-3
    assert quantized("louder").report["ptqd"]["absorbed"] == {}


@pytest.mark.parametrize("name", ["ddpm", "ddim", "sd"])
def test_end_to_end_through_the_checkpoint(name, tmp_path):
    pipe = tiny_pipelines.PIPELINES[name](tmp_path)
    conditions = tiny_pipelines.request_fields(name)
    result = lowtide.quantize(pipe, method="ptqd", **OPTIONS | {"iters": 2}, **conditions)
    request = sampling.Request(steps=4, seeds=(5, 6), batch=2, **conditions)
    ours = sampling.images(pipe, request)
    loaded = DiffusionPipeline.from_pretrained(result.save(tmp_path / "packed"))
    assert loaded.unet.get_submodule(variance_calibration.CORRECTION).noise.any()
    assert np.array_equal(sampling.images(loaded, request), ours)


def test_steps_that_apply_their_bits_round_to_them(monkeypatch, tmp_path):
    """The bits that the report names are those of the inputs, also after loading."""
    stages = {"stepaware": {"apply": True}}
    result = quantized("louder", stages=stages, inputs=8)
    choices = tuple(result.report["ptqd"]["bits by step"].values())
    assert len(set(choices)) > 1
    plans = [plan for plan in result.plan.all_plans() if plan.input is not None]
    assert plans and {plan.input for plan in plans} == {Stepped(choices)}
    clock = find_clock(result.model)
    quantizer = result.model.mid_block.resnets[0].conv1.input
    for step, timestep in enumerate(result.plan.timesteps):
        clock.set(timestep)
        rounded = quantizer(torch.linspace(-2, 6, 1 << 14))
        assert len(rounded.unique()) == 2 ** choices[step]
    mixed = torch.linspace(-2, 6, 1 << 14).expand(4, 1, 1 << 14)
    clock.set(torch.tensor(result.plan.timesteps))
    apart = [len(row.unique()) for row in quantizer(mixed)]
    assert apart == [2**bits for bits in choices]
    request = sampling.Request(steps=4, seeds=(0, 1))
    drawn = sampling.images(result.pipe, request)
    with lowtide.unfused(result):
        assert abs(sampling.images(result.pipe, request) - drawn).max() < 1e-3
    loaded = lowtide.load(result.save(tmp_path / "packed"))
    assert np.array_equal(sampling.images(loaded, request), drawn)
    with pytest.raises(BadInput, match="bits differ from step to step"):
        lowtide.reschedule(result, 8)


def test_a_step_rounds_as_where_its_bits_were_measured(monkeypatch):
    """The signal-to-noise ratio of each step is the one that its number of bits was chosen by."""
    measured: list[torch.Tensor] = []
    measure = ptqd.measure

    def recorded(job):
        moments = measure(job)
        measured.append(moments.snr())
        return moments

    @dataclass(frozen=True)
    class Look(Stage):
        def run(self, job):
            recorded(job)

    monkeypatch.setattr(ptqd, "measure", recorded)
    base = (Collect(), Assign(), FitWeights("minmax"), FitRanges("minmax"))
    recipe = (*base, StepAware(apply=True), Look(), Pack())
    monkeypatch.setitem(METHODS, "looked", lambda settings: recipe)
    chosen = list(quantized("looked").report["ptqd"]["bits by step"].values())
    *tried, mixed = measured
    by_bits = dict(zip((8, 4, 6), tried, strict=True))
    assert len(set(chosen)) > 1
    for step, bits in enumerate(chosen):
        assert mixed[step].item() == pytest.approx(by_bits[bits][step].item(), rel=1e-6)
