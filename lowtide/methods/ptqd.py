"""PTQD: accurate post-training quantization for diffusion models (He et al., NeurIPS 2023, arXiv 2305.10657).

Whatever quantization does inside a denoiser, the sampler only sees noise D on its answer. Part of it is correlated with the
answer itself, part is a constant, and both can be taken off again. The rest is nearly Gaussian; a sampler that adds noise
of its own can count it as some of that. What is known of D, step by step, travels with the checkpoint.

    D = eps^ - eps on the float trajectory                 measure, Moments
    D = k_t eps + D',  k_t by linear regression, k_t > 0   class CNC(Stage): eps^ / (1 + k_t)
    bias of D', by channel                                 class Bias(Stage): (eps^ - bias) / (1 + k_t)
    sigma'^2 = sigma^2 - c^2 sigma_q^2, or 0               class VSC; sampling/variance_calibration.py at each step of the sampler
    lowest bits with SNR^Q(t) > SNR^F(t)                   class StepAware
    the base: BRECQ                                        Reconstruct(), LearnRanges(temporal=True)

VSC acts where the sampler adds noise (DDIM with `eta`, DDPM) and lowtide runs it: a pipeline that diffusers runs by itself takes
k_t and bias off and absorbs nothing, unless it is run inside lowtide.sampling.variance_calibration.absorbing, because the denoiser that holds sigma_q
does not know the sampler.

Departs from the paper: D is measured on each branch of a guided pipeline, not on their mixture; slope and bias are the same
for both, while sigma_q of a mixture is larger where branches err apart, so that less is absorbed than might be. StepAware says
what it would choose and leaves the inputs at their bits: one packed model has one input format for all steps. Attention is
quantized too, and weights have a range for each output channel (profile `full`). Ranges are learnt as qdiffusion's are: for
`range_iters` iterations, 100 unless told, with the squared error and Adam's rate at 1e-2 on the logarithm of each scale; the
paper's base takes 5,000, with p = 2.4 and a rate of 4e-4 that falls along a cosine.
Departs from the released code: bias is that of D', not of all of D. Dividing by 1 + k_t takes k_t times the mean of eps off
already; with the bias of D the mean error left is -k_t / (1 + k_t) times the mean of eps, with that of D' it is 0. Sigma_q is
what no slope of either sign explains. Mu keeps its coefficient; the code computes its direction anew from the smaller sigma.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.formats import Affine
from lowtide.nn.correction import CORRECTION, Correction, channel_axis
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quantizers, set_precision
from lowtide.sampling.variance_calibration import kept_share, signal_to_noise, stochastic_part
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Recipe, Stage
from lowtide.stages.batches import answer_of
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, ranges, run_call, watch, watching_cost
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import correct_answer
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import RANGE_ITERS, LearnRanges, Reconstruct
from lowtide.validation import Within


@dataclass(frozen=True)
class Moments:
    """Means over samples and positions, steps x channels: of eps and D, and of their products."""

    eps: Tensor
    noise: Tensor
    eps_eps: Tensor
    eps_noise: Tensor
    noise_noise: Tensor

    def slope(self) -> Tensor:
        """k_t of D = k_t eps + a constant, for each step."""
        eps = self.eps.mean(1)
        together = self.eps_noise.mean(1) - eps * self.noise.mean(1)
        return together / (self.eps_eps.mean(1) - eps**2).clamp(min=1e-30)

    def sigma(self) -> Tensor:
        """Standard deviation of what neither slope nor bias explains, for each step."""
        k = self.slope()[:, None]
        squares = self.noise_noise - 2 * k * self.eps_noise + k**2 * self.eps_eps
        return (squares - (self.noise - k * self.eps) ** 2).mean(1).clamp(min=0).sqrt()

    def snr(self) -> Tensor:
        """SNR^Q(t) = || eps ||^2 / || D ||^2."""
        return self.eps_eps.mean(1) / self.noise_noise.mean(1).clamp(min=1e-30)

    def error(self) -> float:
        """|| D || / || eps || over all steps."""
        return float((self.noise_noise.sum() / self.eps_eps.sum()).sqrt())


@torch.no_grad()
def measure(job: Job) -> Moments:
    """The quantized model, as corrected so far, against the float model on the recorded calls."""
    known = find_clock(job.model).known
    means: list[list[Tensor]] = [[] for _ in known]
    for call in job.track(job.calls, "quantization noise"):
        eps = answer(job, call, False)
        noise = answer(job, call, True) - eps
        products = (eps, noise, eps * eps, eps * noise, noise * noise)
        means[known[call.timestep]].append(torch.stack([product.mean(1) for product in products]))
    set_precision(job.model, Precision.FULL)
    return Moments(*torch.stack([torch.stack(step).mean(0) for step in means], 1))


def answer(job: Job, call: Call, quantized: bool) -> Tensor:
    """Channels x everything else of the noise that is answered; a learned variance beside it is left out."""
    set_precision(job.model, Precision.of(weights=quantized, inputs=quantized))
    if correction := attached(job):
        correction.active = quantized
    found, asked = answer_of(run_call(job, call)), call.arguments[job.adapter.parameters[0]]
    axis = channel_axis(found)
    return found.movedim(axis, 0)[: asked.shape[axis]].flatten(1).double()


def attached(job: Job) -> Correction | None:
    return job.model._modules.get(CORRECTION)


def correction(job: Job, moments: Moments) -> Correction:
    """The correction of the denoiser's answer, attached at the first need."""
    return attached(job) or correct_answer(job, moments.eps.shape[1])


def told(job: Job) -> dict[str, Any]:
    return job.report.setdefault("ptqd", {})


def _foresee_correction(job: Job) -> None:
    """A table row for each channel of the noise, which are those of the sample."""
    sample = job.calls[0].arguments[job.adapter.parameters[0]]
    job.plan = replace(job.plan, corrected=sample.shape[channel_axis(sample)])


@dataclass(frozen=True)
class CNC(Stage):
    """Correlated noise correction: D is measured anew and regressed on eps; only k_t > 0 is taken off."""

    def run(self, job: Job) -> None:
        moments = measure(job)
        slope = moments.slope().clamp(min=0)
        if slope.any():
            correction(job, moments).slope.copy_(slope)
        told(job).update({"error before CNC": moments.error(), "slope": rounded(slope)})

    def cost(self, load: Workload) -> Cost:
        """Every recorded call in float, and again quantized."""
        return load.comparison(load.calls)

    def foresee(self, job: Job) -> None:
        """A correction for each channel of the answered noise."""
        _foresee_correction(job)


@dataclass(frozen=True)
class Bias(Stage):
    """Bias correction: the mean, by channel, of the noise that is left; after CNC that is the mean of D' / (1 + k_t)."""

    def run(self, job: Job) -> None:
        moments = measure(job)
        if moments.noise.any():
            found = correction(job, moments)
            found.bias += (moments.noise * (1 + found.slope[:, None])).to(found.bias)
        told(job)["error before Bias"] = moments.error()

    def cost(self, load: Workload) -> Cost:
        """Every recorded call in float, and again quantized."""
        return load.comparison(load.calls)

    def foresee(self, job: Job) -> None:
        """A correction for each channel of the answered noise."""
        _foresee_correction(job)


@dataclass(frozen=True)
class VSC(Stage):
    """Variance schedule calibration: how much noise is left, for the sampler to count as its own."""

    def run(self, job: Job) -> None:
        moments = measure(job)
        sigma = moments.sigma()
        if sigma.any():
            correction(job, moments).noise.copy_(sigma)
        told(job).update(
            {
                "error before VSC": moments.error(),
                "sigma": rounded(sigma),
                "absorbed": absorbed(job, sigma),
            }
        )

    def cost(self, load: Workload) -> Cost:
        """Every recorded call in float, and again quantized."""
        return load.comparison(load.calls)

    def foresee(self, job: Job) -> None:
        """A correction for each channel of the answered noise."""
        _foresee_correction(job)


def absorbed(job: Job, sigma: Tensor) -> dict[int, float]:
    """The share of the sampler's variance that is absorbed, by timestep, where the pipeline's sampler adds any."""
    known = find_clock(job.model).known
    parts = {
        timestep: stochastic_part(job.pipe.scheduler, timestep, job.settings.eta or 0.0)
        for timestep in known
    }
    shares = {
        timestep: 1 - kept_share(*parts[timestep], float(sigma[step])) ** 2
        for timestep, step in known.items()
    }
    return {timestep: round(share, 6) for timestep, share in shares.items() if parts[timestep][0]}


@dataclass(frozen=True)
class StepAware(Stage):
    """Step-aware precision: for each step the lowest of the candidates' bits for inputs that keeps SNR^Q above SNR^F."""

    candidates: tuple[Annotated[int, Within(1, 8)], ...] = (4, 6, 8)

    def run(self, job: Job) -> None:
        most, forward = job.settings.inputs, self.forward(job)
        if most > 8 or None in forward.values():
            return
        firsts = {call.timestep: call for call in reversed(job.calls)}
        one = replace(job, calls=[firsts[timestep] for timestep in forward])
        found = at_fewer_bits(one, [bits for bits in self.candidates if bits < most]) | {
            most: measure(one).snr()
        }
        enough = {
            timestep: [bits for bits, snr in sorted(found.items()) if snr[step] > forward[timestep]]
            for timestep, step in find_clock(job.model).known.items()
        }
        told(job)["bits by step"] = {
            timestep: min(bits, default=most) for timestep, bits in enough.items()
        }

    def forward(self, job: Job) -> dict[int, float | None]:
        """SNR^F of each calibrated timestep."""
        ticks = job.adapter.ticks
        return {
            t: signal_to_noise(job.pipe.scheduler, round(t / ticks))
            for t in find_clock(job.model).known
        }

    def cost(self, load: Workload) -> Cost:
        """One call of each step, watched once and compared at each candidate's bits and its own."""
        if load.settings.inputs > 8:
            return Cost()
        fewer = [bits for bits in self.candidates if bits < load.settings.inputs]
        compared = load.comparison(load.steps)
        watched = watching_cost(load, search=True)
        seconds = (len(fewer) + 1) * compared.seconds + watched.seconds * load.steps / load.calls
        return Cost(seconds, max(compared.bytes, watched.bytes))


def at_fewer_bits(job: Job, candidates: list[int]) -> dict[int, Tensor]:
    """SNR^Q by step with uniform inputs at other bits; everything is put back."""
    clock = find_clock(job.model)
    uniform = {
        name: each
        for name, each in quantizers(job.model).items()
        if isinstance(each.format, Affine)
    }
    before, formats = (
        (clock.scale.clone(), clock.zero.clone()),
        {name: each.format for name, each in uniform.items()},
    )
    seen, found = watch(job, keep=True), {}
    for bits in candidates:
        for name, quantizer in uniform.items():
            quantizer.format = Affine(bits)
            quantizer.fit(*ranges(seen[name], quantizer, "mse"))
        found[bits] = measure(job).snr()
    for name, quantizer in uniform.items():
        quantizer.format = formats[name]
    clock.scale.copy_(before[0])
    clock.zero.copy_(before[1])
    return found


def rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def recipe(settings: Settings) -> Recipe:
    learnt = LearnRanges(settings.range_iters or RANGE_ITERS, temporal=True)
    start = (Collect(), Assign(), FitWeights("mse"), Reconstruct(), FitRanges("mse"), learnt)
    return (*start, StepAware(), CNC(), Bias(), VSC(), Pack())
