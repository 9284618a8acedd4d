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
branches differ, so less may be absorbed than would be possible. StepAware chooses the bits of
inputs; the paper's also chooses those of weights, and stores a network for each. It reports its
choice and leaves the inputs at their bits unless `apply` says otherwise: no kernel has a last code
for each step, so that such a model runs in plain torch. Attention is quantized too, and weights
have a range for each output channel (profile `full`). Ranges are learnt as in qdiffusion: for
`range_iters` iterations, 100 by default, with the squared error, and Adam at 1e-2 on the logarithm
of each scale. The paper's base takes 5,000 iterations, p = 2.4 and a rate of 4e-4 that falls along
a cosine.

Departs from the released code: bias is that of D', not of all of D. Dividing by 1 + k_t already
subtracts k_t times the mean of eps. With the bias of D, a mean error of -k_t / (1 + k_t) times the
mean of eps is left; with that of D' it is 0. Sigma_q is what no slope of either sign explains. Mu
keeps its coefficient; the code recomputes its direction from the smaller sigma.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from torch import Tensor

from lowtide.costs import Cost, Workload
from lowtide.formats import Affine, Stepped
from lowtide.nn.correction import Correction, channel_axis
from lowtide.nn.plan import LayerPlan
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock, quantizers
from lowtide.sampling.variance_calibration import remaining_share, signal_to_noise, stochastic_part
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Recipe, Stage
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, input_statistics, ranges, statistics_cost
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import RANGE_ITERS, LearnRanges
from lowtide.stages.model_edits import correct_answer
from lowtide.stages.pack import Pack
from lowtide.stages.quantization_noise import Moments, attached, measure
from lowtide.stages.reconstruct import Reconstruct
from lowtide.validation import Within


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
    """Step-aware precision: for each step, the fewest input bits that keep SNR^Q above SNR^F.

    apply: round the inputs to these bits; otherwise only report them.
    """

    candidates: tuple[Annotated[int, Within(1, 8)], ...] = (4, 6, 8)
    apply: bool = False

    def run(self, job: Job) -> None:
        bits = job.settings.inputs
        forward = _forward_snr(job)
        if bits > 8 or forward is None:
            return
        first_calls = {call.timestep: call for call in reversed(job.calls)}
        one_a_step = job.changed(calls=[first_calls[timestep] for timestep in forward])
        tables = _StepTables(one_a_step)
        snr = {bits: measure(one_a_step).snr()}
        for fewer in self._fewer_than(bits):
            tables.use(fewer)
            snr[fewer] = measure(one_a_step).snr()
        choices: dict[int, int] = {}
        for timestep, step in find_clock(job.model).known.items():
            enough = [each for each in snr if snr[each][step] > forward[timestep]]
            choices[timestep] = min(enough, default=bits)
        tables.restore()
        if self.apply:
            tables.mix(tuple(choices.values()))
            _plan_bits(job, tables.quantizers, tuple(choices.values()))
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

    def predict_plan(self, job: Job) -> None:
        """Every step keeps its bits, which take as many bytes as others."""
        if self.apply and job.settings.inputs <= 8:
            count = len(job.plan.timesteps)
            _plan_bits(job, quantizers(job.model), (job.settings.inputs,) * count)

    def _fewer_than(self, bits: int) -> list[int]:
        return [candidate for candidate in self.candidates if candidate < bits]


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


class _StepTables:
    """The ranges of all uniform inputs at each number of bits that was tried."""

    def __init__(self, job: Job):
        self.job = job
        self.clock = find_clock(job.model)
        self.quantizers = {
            name: quantizer
            for name, quantizer in quantizers(job.model).items()
            if isinstance(quantizer.format, Affine)
        }
        self.formats = {name: each.format for name, each in self.quantizers.items()}
        self.own = (self.clock.scale.clone(), self.clock.zero.clone())
        self.tables = {job.settings.inputs: self.own}
        self.statistics = input_statistics(job, keep=True)

    def use(self, bits: int) -> None:
        """Round all uniform inputs to this many bits, on ranges searched for them."""
        for name, quantizer in self.quantizers.items():
            quantizer.format = Affine(bits)
            quantizer.fit(*ranges(self.statistics[name], quantizer, "mse"))
        self.tables[bits] = (self.clock.scale.clone(), self.clock.zero.clone())

    def restore(self) -> None:
        """Round as before."""
        for name, quantizer in self.quantizers.items():
            quantizer.format = self.formats[name]
        self.clock.scale.copy_(self.own[0])
        self.clock.zero.copy_(self.own[1])

    def mix(self, bits: tuple[int, ...]) -> None:
        """Round to bits[t] bits at step t."""
        self.clock.widen()
        columns = [step if self.own[0].shape[1] > 1 else 0 for step in range(len(bits))]
        for quantizer in self.quantizers.values():
            row = quantizer.row
            quantizer.format = Stepped(bits)
            quantizer.per_step = True
            for step, (count, column) in enumerate(zip(bits, columns, strict=True)):
                scale, zero = self.tables[count]
                self.clock.scale[row, step] = scale[row, column]
                self.clock.zero[row, step] = zero[row, column]


def _plan_bits(job: Job, uniform: Mapping[str, Quantizer], bits: tuple[int, ...]) -> None:
    """Plan a number of bits for each step, for these quantizers; their names say whose they are."""

    def stepped(plan: LayerPlan) -> LayerPlan:
        return replace(plan, input=Stepped(bits), per_step=True)

    layers = dict(job.plan.layers)
    for name in layers:
        if uniform.keys() & {f"{name}.input", f"{name}.layer.input"}:
            layers[name] = stepped(layers[name])
    attentions: dict[str, dict[str, LayerPlan]] = {}
    for name, parts in job.plan.attentions.items():
        attentions[name] = {
            part: stepped(plan) if f"{name}.processor.{part}" in uniform else plan
            for part, plan in parts.items()
        }
    job.plan = replace(job.plan, layers=layers, attentions=attentions)


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
