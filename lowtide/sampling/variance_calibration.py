"""PTQD's variance schedule calibration: the sampler adds less noise where the prediction has some.

A sampler's step gives x' = mu + sigma z. Where the prediction changes by one, mu changes by c, so
noise of standard deviation s in the prediction is noise of c s in x'. With sqrt(sigma^2 - c^2 s^2)
in place of sigma, x' has as much noise in total as the sampler wants; mu stays as it is. The
denoiser's correction knows s of its latest prediction, see nn/correction.py.

Where x_0 is clipped, c does not describe how x' changes with that pixel's prediction: DDPM lets
less of the noise through; diffusers' DDIM keeps the prediction itself and lets more through.
The noise of clipped pixels is absorbed only in part.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from math import sqrt
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from lowtide.nn.correction import CORRECTION, Correction
from lowtide.sampling.pipelines import Generators, Scheduler, StepOutput


class _NoiseScheduler(Scheduler, Protocol):
    """What is used of DDIMScheduler and DDPMScheduler; only the latter has previous_timestep."""

    alphas_cumprod: Tensor
    num_inference_steps: int

    def previous_timestep(self, timestep: int) -> int | Tensor: ...


@dataclass(frozen=True)
class _Step:
    """One step from x to x'.

    alpha: alpha-bar of the step's timestep.
    variance: sigma^2 of the noise that the step adds.
    slope: how far mu moves with x_0.
    """

    alpha: float
    variance: float
    slope: float


def _alpha_bars(scheduler: _NoiseScheduler, timestep: int, previous: int) -> tuple[float, float]:
    """alpha-bar of a timestep and of the timestep that the sampler steps to."""
    alphas = scheduler.alphas_cumprod
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return float(alphas[timestep]), float(alphas[previous] if previous >= 0 else last)


def _posterior_variance(alpha: float, previous: float) -> float:
    return (1 - previous) / (1 - alpha) * (1 - alpha / previous)


def _ddim(scheduler: _NoiseScheduler, timestep: int, eta: float) -> _Step:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _ddim_step(scheduler, timestep, timestep - stride, eta)


def _quadratic_ddim(scheduler: _NoiseScheduler, timestep: int, eta: float) -> _Step:
    return _ddim_step(scheduler, timestep, int(scheduler.previous_timestep(timestep)), eta)


def _ddim_step(
    scheduler: _NoiseScheduler, timestep: int, previous_timestep: int, eta: float
) -> _Step:
    alpha, previous = _alpha_bars(scheduler, timestep, previous_timestep)
    variance = eta**2 * _posterior_variance(alpha, previous)
    direction = sqrt(max(0.0, 1 - previous - variance)) * sqrt(alpha / (1 - alpha))
    return _Step(alpha, variance, sqrt(previous) - direction)


def _ddpm(scheduler: _NoiseScheduler, timestep: int, eta: float) -> _Step:
    """Ancestral sampling has no eta; a variance that the model predicts is not known here."""
    previous_timestep = int(scheduler.previous_timestep(timestep))
    alpha, previous = _alpha_bars(scheduler, timestep, previous_timestep)
    small = _posterior_variance(alpha, previous)
    large = 1 - alpha / previous
    known = {"fixed_small": small, "fixed_small_log": small, "fixed_large": large}
    variance = known.get(scheduler.config.variance_type, 0.0) if timestep > 0 else 0.0
    return _Step(alpha, variance, sqrt(previous) * large / (1 - alpha))


SAMPLERS: dict[str, Callable[[_NoiseScheduler, int, float], _Step]] = {
    "DDIMScheduler": _ddim,
    "QuadraticDDIMScheduler": _quadratic_ddim,
    "DDPMScheduler": _ddpm,
}
# How far x_0 moves with the prediction, as a function of alpha-bar, by what the model predicts.
ORIGINALS: dict[str, Callable[[float], float]] = {
    "epsilon": lambda alpha: -sqrt((1 - alpha) / max(alpha, 1e-12)),
    "v_prediction": lambda alpha: -sqrt(1 - alpha),
    "sample": lambda alpha: 1.0,
}


def stochastic_part(scheduler: Scheduler, timestep: int, eta: float = 0.0) -> tuple[float, float]:
    """sigma and c of one step; both are 0 for a sampler that is not in SAMPLERS."""
    name = type(scheduler).__name__
    if name not in SAMPLERS:
        return 0.0, 0.0
    step = SAMPLERS[name](cast(_NoiseScheduler, scheduler), timestep, eta)
    original = ORIGINALS[scheduler.config.prediction_type](step.alpha)
    return sqrt(max(0.0, step.variance)), step.slope * original


def remaining_share(sigma: float, c: float, noise: float) -> float:
    """The share of sigma that is still to be added, for noise of this size in the prediction."""
    return sqrt(max(0.0, 1 - (c * noise / sigma) ** 2)) if sigma else 1.0


def signal_to_noise(scheduler: Scheduler, timestep: int) -> float | None:
    """SNR^F(t) = alpha-bar / (1 - alpha-bar) of the forward process.

    None for a scheduler without alpha-bars, such as those of flow matching.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return None if alphas is None else float(alphas[timestep] / (1 - alphas[timestep]))


@contextmanager
def stepping(scheduler: Scheduler, step: Callable[..., object]) -> Iterator[None]:
    """Replace the scheduler's `step` within the context."""
    before = vars(scheduler).get("step")
    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


@contextmanager
def calibrated_variance(scheduler: Scheduler, model: nn.Module) -> Iterator[None]:
    """Let the sampler add less noise, by what the denoiser's correction knows of its predictions.

    Without a correction, or with a sampler that is not in SAMPLERS, nothing changes.
    """
    correction = cast(Correction | None, model._modules.get(CORRECTION))
    if correction is None or type(scheduler).__name__ not in SAMPLERS:
        yield
        return
    step = scheduler.step

    @wraps(step)
    def calmer(
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        *args: object,
        **options: object,
    ) -> object:
        arguments = signature(step).bind(model_output, timestep, sample, *args, **options).arguments
        sigma, c = stochastic_part(scheduler, int(timestep), arguments.get("eta", 0.0))
        share = remaining_share(sigma, c, correction.remaining())
        generator = arguments.get("generator")
        given = arguments.get("variance_noise")
        z = None if share == 1 else _coming_noise(model_output, generator, given)
        result = step(model_output, timestep, sample, *args, **options)
        return result if z is None else _less_noisy(result, (1 - share) * sigma * z)

    with stepping(scheduler, calmer):
        yield


def _coming_noise(
    like: Tensor, generator: Generators, variance_noise: Tensor | None
) -> Tensor | None:
    """The noise z that the step gets or is about to draw; None if it uses torch's own generator."""
    if variance_noise is not None or not generator:
        return variance_noise
    generators = generator if isinstance(generator, list) else [generator]
    # A generator that is in the list twice draws twice, so each has one copy.
    copies = {id(each): _copied(each) for each in generators}
    shape = like.shape if len(generators) == 1 else (1, *like.shape[1:])
    noise = [
        torch.randn(shape, generator=copies[id(each)], device=each.device, dtype=like.dtype)
        for each in generators
    ]
    return torch.cat(noise).to(like.device)


def _copied(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def _less_noisy(result: tuple[Tensor, ...] | StepOutput, surplus: Tensor) -> object:
    """A step's result, a tuple or diffusers' own kind, with `surplus` subtracted from x'."""
    if isinstance(result, tuple):
        return (result[0] - surplus, *result[1:])
    result.prev_sample = result.prev_sample - surplus
    return result
