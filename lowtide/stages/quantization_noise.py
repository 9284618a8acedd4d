"""Quantization noise: how far the quantized model's answers are from the float model's, by step."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.models import answer_of
from lowtide.nn.correction import CORRECTION, Correction, channel_axis
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.fit_ranges import run_call


@dataclass(frozen=True)
class Moments:
    """Means over samples and positions, (steps, channels): of eps, of D, and of their products."""

    eps: Tensor
    noise: Tensor
    eps_eps: Tensor
    eps_noise: Tensor
    noise_noise: Tensor

    def slope(self) -> Tensor:
        """k_t of D = k_t eps + a constant: (steps,)."""
        eps = self.eps.mean(1)
        covariance = self.eps_noise.mean(1) - eps * self.noise.mean(1)
        variance = self.eps_eps.mean(1) - eps**2
        return covariance / variance.clamp(min=1e-30)

    def sigma(self) -> Tensor:
        """Standard deviation of what neither slope nor bias explains: (steps,)."""
        k = self.slope()[:, None]
        squares = self.noise_noise - 2 * k * self.eps_noise + k**2 * self.eps_eps
        return (squares - (self.noise - k * self.eps) ** 2).mean(1).clamp(min=0).sqrt()

    def snr(self) -> Tensor:
        """SNR^Q(t) = || eps ||^2 / || D ||^2: (steps,)."""
        return self.eps_eps.mean(1) / self.noise_noise.mean(1).clamp(min=1e-30)

    def error(self) -> float:
        """|| D || / || eps || over all steps."""
        return float((self.noise_noise.sum() / self.eps_eps.sum()).sqrt())


@torch.no_grad()
def measure(job: Job) -> Moments:
    """Compare the quantized model, as corrected so far, with the float model on all calls.

    Each rank compares its part of the calls.
    """
    means: list[list[Tensor]] = [[] for _ in find_clock(job.model).known]
    calls = job.track(job.world.part(job.calls), "quantization noise")
    for step, mean in job.world.gathered([_means(job, call) for call in calls]):
        means[step].append(mean.to(job.device))
    set_precision(job.model, Precision.FULL)
    return Moments(*torch.stack([torch.stack(step).mean(0) for step in means], 1))


def _means(job: Job, call: Call) -> tuple[int, Tensor]:
    """The step of a call, and the means of its products by channel."""
    eps = answer(job, call, quantized=False)
    noise = answer(job, call, quantized=True) - eps
    products = (eps, noise, eps * eps, eps * noise, noise * noise)
    step = find_clock(job.model).known[call.timestep]
    return step, torch.stack([product.mean(1) for product in products]).cpu()


def answer(job: Job, call: Call, *, quantized: bool) -> Tensor:
    """The noise that the denoiser predicts: (channels, values), without a learned variance."""
    set_precision(job.model, Precision.of(weights=quantized, inputs=quantized))
    if correction := attached(job):
        correction.active = quantized
    output = answer_of(run_call(job, call))
    sample = call.arguments[job.adapter.parameters[0]]
    axis = channel_axis(output)
    return output.movedim(axis, 0)[: sample.shape[axis]].flatten(1).double()


def attached(job: Job) -> Correction | None:
    """The correction of the denoiser's answer, if there is one already."""
    module = job.model._modules.get(CORRECTION)
    assert module is None or isinstance(module, Correction)
    return module
