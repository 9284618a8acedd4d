"""PTQD: accurate quantization of diffusion models (He et al., NeurIPS 2023, arXiv 2305.10657).

Whatever quantization does inside a denoiser, the sampler only sees noise D on its answer. One part
of D is correlated with the answer and another part is constant; both can be subtracted. The rest
is nearly Gaussian, and a sampler that adds noise of its own can count it as part of that noise.

    D = eps^ - eps on the float trajectory            measure, class Moments
    D = k_t eps + D', linear regression, k_t > 0      class CNC: eps^ / (1 + k_t)
    bias of D', by channel                            class Bias: (eps^ - bias) / (1 + k_t)
    sigma'^2 = sigma^2 - c^2 sigma_q^2, or 0          class VSC, and at each step of the sampler
                                                      sampling/variance_calibration.py
    lowest bits with SNR^Q(t) > SNR^F(t)              class StepAware
    the base: BRECQ                                   Reconstruct(), LearnRanges(temporal=True)

VSC acts only where the sampler adds noise (DDIM with `eta`, DDPM) and lowtide runs it. A pipeline
that diffusers runs by itself corrects k_t and bias but absorbs nothing, because the denoiser holds
sigma_q and does not know the sampler. Inside `calibrated_variance` of
lowtide.sampling.variance_calibration it absorbs too.

Departs from the paper: D is measured on each branch of a guided pipeline, not on their mixture.
Slope and bias are the same for both. The sigma_q of a mixture is larger where the errors of its
branches differ, so less may be absorbed than would be possible. StepAware reports the bits that it
would choose and leaves the inputs at their bits, because a packed model has one input format for
all steps. Attention is quantized too, and weights have a range for each output channel (profile
`full`). Ranges are learnt as in qdiffusion: for `range_iters` iterations, 100 by default, with the
squared error, and Adam at 1e-2 on the logarithm of each scale. The paper's base takes 5,000
iterations, p = 2.4 and a rate of 4e-4 that falls along a cosine.

Departs from the released code: bias is that of D', not of all of D. Dividing by 1 + k_t already
subtracts k_t times the mean of eps. With the bias of D, a mean error of -k_t / (1 + k_t) times the
mean of eps is left; with that of D' it is 0. Sigma_q is what no slope of either sign explains. Mu
keeps its coefficient; the code recomputes its direction from the smaller sigma.
"""

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.formats import Affine
from lowtide.models import answer_of
from lowtide.nn.correction import CORRECTION, Correction, channel_axis
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quantizers, set_precision
from lowtide.sampling.variance_calibration import remaining_share, signal_to_noise, stochastic_part
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, input_statistics, ranges, run_call, statistics_cost
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import correct_answer
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import RANGE_ITERS, LearnRanges, Reconstruct
from lowtide.validation import Within


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


class _Correcting(Stage):
    """What CNC, Bias and VSC share: each measures D once and fills a part of the correction."""

    def cost(self, load: Workload) -> Cost:
        """Every recorded call in float, and again quantized."""
        return load.comparison(load.calls)

    def predict_plan(self, job: Job) -> None:
        """A correction has a row for each channel of the noise, which are those of the sample."""
        sample = job.calls[0].arguments[job.adapter.parameters[0]]
        job.plan = replace(job.plan, corrected=sample.shape[channel_axis(sample)])


@dataclass(frozen=True)
class CNC(_Correcting):
    """Correlated noise correction: regress D on eps and correct by k_t where it is positive."""

    def run(self, job: Job) -> None:
        moments = measure(job)
        slope = moments.slope().clamp(min=0)
        if slope.any():
            _correction(job, moments).slope.copy_(slope)
        _summary(job).update({"error before CNC": moments.error(), "slope": _rounded(slope)})


@dataclass(frozen=True)
class Bias(_Correcting):
    """Bias correction: subtract the mean, by channel, of the remaining noise.

    After CNC that is the mean of D' / (1 + k_t).
    """

    def run(self, job: Job) -> None:
        moments = measure(job)
        if moments.noise.any():
            correction = _correction(job, moments)
            bias = moments.noise * (1 + correction.slope[:, None])
            correction.bias += bias.to(correction.bias)
        _summary(job)["error before Bias"] = moments.error()

    def summary(self, job: Job) -> str:
        return "mean of the remaining noise subtracted, for each channel and timestep"


@dataclass(frozen=True)
class VSC(_Correcting):
    """Variance schedule calibration: save how much noise is left, for the sampler to absorb."""

    def run(self, job: Job) -> None:
        moments = measure(job)
        sigma = moments.sigma()
        if sigma.any():
            _correction(job, moments).noise.copy_(sigma)
        _summary(job).update(
            {
                "error before VSC": moments.error(),
                "sigma": _rounded(sigma),
                "absorbed": job.world.of_first(lambda: _absorbed(job, sigma)),
            }
        )


@dataclass(frozen=True)
class StepAware(Stage):
    """Step-aware precision: for each step, the fewest input bits that keep SNR^Q above SNR^F."""

    candidates: tuple[Annotated[int, Within(1, 8)], ...] = (4, 6, 8)

    def run(self, job: Job) -> None:
        bits = job.settings.inputs
        forward = _forward_snr(job)
        if bits > 8 or forward is None:
            return
        first_calls = {call.timestep: call for call in reversed(job.calls)}
        one_a_step = job.changed(calls=[first_calls[timestep] for timestep in forward])
        snr = _snr_at_fewer_bits(one_a_step, self._fewer_than(bits))
        snr[bits] = measure(one_a_step).snr()
        choices: dict[int, int] = {}
        for timestep, step in find_clock(job.model).known.items():
            enough = [each for each in snr if snr[each][step] > forward[timestep]]
            choices[timestep] = min(enough, default=bits)
        _summary(job)["bits by step"] = choices

    def cost(self, load: Workload) -> Cost:
        """One call of each step, observed once and compared at each number of bits."""
        bits = load.settings.inputs
        if bits > 8:
            return Cost()
        compared = load.comparison(load.steps)
        observed = statistics_cost(load, search=True)
        comparisons = (len(self._fewer_than(bits)) + 1) * compared.seconds
        seconds = comparisons + observed.seconds * load.steps / load.calls
        return Cost(seconds, max(compared.bytes, observed.bytes))

    def _fewer_than(self, bits: int) -> list[int]:
        return [candidate for candidate in self.candidates if candidate < bits]


@torch.no_grad()
def measure(job: Job) -> Moments:
    """Compare the quantized model, as corrected so far, with the float model on all calls."""
    means: list[list[Tensor]] = [[] for _ in find_clock(job.model).known]
    calls = job.track(job.world.part(job.calls), "quantization noise")
    for step, mean in job.world.gathered([_means(job, call) for call in calls]):
        means[step].append(mean.to(job.device))
    set_precision(job.model, Precision.FULL)
    return Moments(*torch.stack([torch.stack(step).mean(0) for step in means], 1))


def _means(job: Job, call: Call) -> tuple[int, Tensor]:
    eps = answer(job, call, quantized=False)
    noise = answer(job, call, quantized=True) - eps
    values = (eps, noise, eps * eps, eps * noise, noise * noise)
    step = find_clock(job.model).known[call.timestep]
    return step, torch.stack([each.mean(1) for each in values]).cpu()


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


def _correction(job: Job, moments: Moments) -> Correction:
    """The correction of the denoiser's answer, attached on first use."""
    return attached(job) or correct_answer(job, moments.eps.shape[1])


def _summary(job: Job) -> dict[str, object]:
    """The part of the report that the stages of this paper fill."""
    return job.report.setdefault("ptqd", {})


def _absorbed(job: Job, sigma: Tensor) -> dict[int, float]:
    """By timestep where the pipeline's sampler adds noise: the share of its variance absorbed."""
    shares: dict[int, float] = {}
    for timestep, step in find_clock(job.model).known.items():
        own, c = stochastic_part(job.pipe.scheduler, timestep, job.settings.eta or 0.0)
        if own:
            shares[timestep] = round(1 - remaining_share(own, c, float(sigma[step])) ** 2, 6)
    return shares


def _forward_snr(job: Job) -> dict[int, float] | None:
    """SNR^F of each calibrated timestep; None where the scheduler has no forward process."""
    snr: dict[int, float] = {}
    for timestep in find_clock(job.model).known:
        value = signal_to_noise(job.pipe.scheduler, round(timestep / job.adapter.ticks))
        if value is None:
            return None
        snr[timestep] = value
    return snr


def _snr_at_fewer_bits(job: Job, candidates: list[int]) -> dict[int, Tensor]:
    """SNR^Q by step, with uniform inputs at each of these bits; the model's own are restored."""
    clock = find_clock(job.model)
    uniform = {
        name: quantizer
        for name, quantizer in quantizers(job.model).items()
        if isinstance(quantizer.format, Affine)
    }
    scale = clock.scale.clone()
    zero = clock.zero.clone()
    formats = {name: quantizer.format for name, quantizer in uniform.items()}
    statistics = input_statistics(job, keep=True)
    snr: dict[int, Tensor] = {}
    for bits in candidates:
        for name, quantizer in uniform.items():
            quantizer.format = Affine(bits)
            quantizer.fit(*ranges(statistics[name], quantizer, "mse"))
        snr[bits] = measure(job).snr()
    for name, quantizer in uniform.items():
        quantizer.format = formats[name]
    clock.scale.copy_(scale)
    clock.zero.copy_(zero)
    return snr


def _rounded(values: Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def recipe(settings: Settings) -> Recipe:
    return (
        Collect(),
        Assign(),
        FitWeights("mse"),
        Reconstruct(),
        FitRanges("mse"),
        LearnRanges(settings.range_iters or RANGE_ITERS, temporal=True),
        StepAware(),
        CNC(),
        Bias(),
        VSC(),
        Pack(),
    )
