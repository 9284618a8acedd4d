"""PTQD on invented moments: the noise that a sampler absorbs, and the bits of each step."""

from itertools import pairwise

import pytest
import tiny_pipelines
import torch

from lowtide.methods import ptqd
from lowtide.methods.ptqd import VSC, Moments, StepAware
from lowtide.models import adapt
from lowtide.nn.swap import find_clock
from lowtide.sampling import denoiser
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect


def moments(eps_eps: list[float], noise_noise: list[float]) -> Moments:
    """Of means of zero: two channels that are alike."""
    zeros = torch.zeros(len(eps_eps), 2, dtype=torch.double)
    squares = [
        torch.tensor(each).double()[:, None].expand(-1, 2) for each in (eps_eps, noise_noise)
    ]
    return Moments(zeros, zeros, squares[0], zeros, squares[1])


def started(tmp_path, **settings) -> Job:
    pipe = tiny_pipelines.ddim(tmp_path)
    model = denoiser(pipe)
    options = Settings(**{"steps": 4, "images": 1, "eta": 1.0} | settings)
    job = Job(pipe, model, adapt(model), options, "test")
    run_recipe((Collect(), Assign()), job)
    return job


def test_the_error_is_of_all_steps_and_the_ratio_of_each():
    ours = moments([1.0, 4.0], [0.25, 1.0])
    assert ours.error() == 0.5
    assert ours.snr().tolist() == [4.0, 4.0]
    assert moments([1.0, 1.0], [0.0, 0.5]).snr().tolist() == pytest.approx([1e30, 2.0])


def test_sigma_is_what_neither_slope_nor_mean_explains():
    eps, rest = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1]]).double()
    noise = 0.5 * eps + 0.25 + 0.125 * rest
    parts = (eps, noise, eps * eps, eps * noise, noise * noise)
    ours = Moments(*(part.mean().reshape(1, 1) for part in parts))
    assert ours.slope().item() == 0.5
    assert ours.sigma().item() == pytest.approx(0.125)


@pytest.mark.parametrize("sigma", [0.02, 100.0])
def test_what_the_sampler_absorbs_is_noise_that_it_need_not_add(sigma, tmp_path, monkeypatch):
    """DDIM at eta 1 adds sigma_t z; noise of c sigma in its answer is noise in x' already."""
    job = started(tmp_path)
    monkeypatch.setattr(ptqd, "measure", lambda job: moments([1.0] * 4, [sigma**2] * 4))
    VSC().run(job)
    alphas = job.pipe.scheduler.alphas_cumprod.double()
    shares = job.report["ptqd"]["absorbed"]
    known = [call.timestep for call in job.calls]
    assert list(shares) == known[:-1]  # the last step adds no noise
    for now, then in pairwise(known):
        alpha, previous = alphas[now], alphas[then]
        variance = (1 - previous) / (1 - alpha) * (1 - alpha / previous)
        c = (1 - previous - variance).sqrt() - (previous * (1 - alpha) / alpha).sqrt()
        expected = min(1.0, (c * sigma).square().item() / variance.item())
        assert shares[now] == pytest.approx(expected, abs=2e-6)
    assert job.report["ptqd"]["sigma"] == pytest.approx([sigma] * 4)


def test_each_step_takes_the_fewest_bits_whose_ratio_is_above_the_schedules(tmp_path, monkeypatch):
    job = started(tmp_path, inputs=8)
    known = find_clock(job.model).known
    forward = {timestep: 1.0 + step for timestep, step in known.items()}  # 1, 2, 3, 4
    ratios = {8: [3.0] * 4, 4: [1.5, 2.0, 0.0, 9.0], 6: [9.0, 2.5, 3.0, 0.0]}
    asked: list = []

    class Tables:
        """Stands for the tables of ranges, and notes the bits that are asked for."""

        def __init__(self, part: Job):
            asked.append([call.timestep for call in part.calls])
            self.bits = 8
            asked.append(self)

        def use(self, bits: int) -> None:
            self.bits = bits
            asked.append(bits)

        def restore(self) -> None:
            asked.append("restored")

    monkeypatch.setattr(ptqd, "_forward_snr", lambda job: forward)
    monkeypatch.setattr(ptqd, "_StepTables", Tables)
    monkeypatch.setattr(ptqd, "measure", lambda job: moments(ratios[asked[1].bits], [1.0] * 4))
    StepAware(candidates=(4, 6, 8)).run(job)
    chosen = [job.report["ptqd"]["bits by step"][timestep] for timestep in known]
    assert chosen == [4, 6, 8, 4]  # at the third, no ratio is above 3
    timesteps, _, *uses = asked
    assert timesteps == list(known)
    assert uses == [4, 6, "restored"]
