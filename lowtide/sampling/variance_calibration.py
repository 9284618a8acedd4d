"""Absorb: a sampler that adds noise adds less of it where the denoiser's answer is noisy already (PTQD's variance schedule).

A step gives x' = mu + sigma z. Where the answer moves by one, mu moves by c, so noise of standard deviation s in the answer is
noise of c s in x'. With sqrt(sigma^2 - c^2 s^2) in place of sigma the sum is what the sampler asked for; mu stays as it is.
Where x0 is clipped, c is not what a step makes of that pixel's answer (DDPM lets less noise through, diffusers' DDIM keeps the
answer and with it more): the noise of clipped pixels is absorbed only in part. The denoiser tells s of its latest answer, see
nn/correction.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.nn.correction import CORRECTION

Levels = tuple[float, float]


def levels(scheduler: Any, timestep: int, before: int) -> Levels:
    """alpha-bar of a timestep and of the one that follows in sampling."""
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return float(scheduler.alphas_cumprod[timestep]), float(
        scheduler.alphas_cumprod[before] if before >= 0 else last
    )


def posterior(alpha: float, before: float) -> float:
    return (1 - before) / (1 - alpha) * (1 - alpha / before)


def ddim(scheduler: Any, timestep: int, eta: float) -> tuple[Levels, float, float]:
    """alpha-bars, sigma^2, and how far mu moves with x_0."""
    alpha, before = levels(
        scheduler,
        timestep,
        timestep - scheduler.config.num_train_timesteps // scheduler.num_inference_steps,
    )
    variance = eta**2 * posterior(alpha, before)
    towards = sqrt(max(0.0, 1 - before - variance)) * sqrt(alpha / (1 - alpha))
    return (alpha, before), variance, sqrt(before) - towards


def ddpm(scheduler: Any, timestep: int, eta: float) -> tuple[Levels, float, float]:
    """The same of ancestral sampling, which has no eta; a variance that the model learnt is the model's to tell."""
    alpha, before = levels(scheduler, timestep, int(scheduler.previous_timestep(timestep)))
    small, large = posterior(alpha, before), 1 - alpha / before
    known = {"fixed_small": small, "fixed_small_log": small, "fixed_large": large}
    variance = known.get(scheduler.config.variance_type, 0.0) if timestep > 0 else 0.0
    return (alpha, before), variance, sqrt(before) * large / (1 - alpha)


SAMPLERS: dict[str, Callable[[Any, int, float], tuple[Levels, float, float]]] = {
    "DDIMScheduler": ddim,
    "DDPMScheduler": ddpm,
}
# How far x_0 moves with the answer, by what the model was trained to answer.
ORIGINALS: dict[str, Callable[[float], float]] = {
    "epsilon": lambda alpha: -sqrt((1 - alpha) / max(alpha, 1e-12)),
    "v_prediction": lambda alpha: -sqrt(1 - alpha),
    "sample": lambda alpha: 1.0,
}


def stochastic_part(scheduler: Any, timestep: int, eta: float = 0.0) -> tuple[float, float]:
    """sigma and c of one step; no sigma for samplers that add no noise, or that are not known here."""
    name = type(scheduler).__name__
    if name not in SAMPLERS:
        return 0.0, 0.0
    (alpha, _), variance, with_original = SAMPLERS[name](scheduler, timestep, eta)
    return sqrt(max(0.0, variance)), with_original * ORIGINALS[scheduler.config.prediction_type](
        alpha
    )


def kept_share(sigma: float, c: float, noise: float) -> float:
    """The share of sigma that is still to be added."""
    return sqrt(max(0.0, 1 - (c * noise / sigma) ** 2)) if sigma else 1.0


def signal_to_noise(scheduler: Any, timestep: int) -> float | None:
    """SNR^F(t) = alpha-bar / (1 - alpha-bar) of the forward process, where the scheduler has such."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    return None if alphas is None else float(alphas[timestep] / (1 - alphas[timestep]))


@contextmanager
def stepping(scheduler: Any, step: Callable) -> Iterator[None]:
    """Let the scheduler step another way for a while."""
    before = vars(scheduler).get("step")
    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


@contextmanager
def absorbing(scheduler: Any, model: nn.Module) -> Iterator[None]:
    """Sample with less noise, by what the denoiser's correction says is in its answers; without a correction, as ever."""
    correction, step = model._modules.get(CORRECTION), scheduler.step
    if correction is None or type(scheduler).__name__ not in SAMPLERS:
        yield
        return

    @wraps(step)
    def calmer(
        model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any
    ) -> Any:
        given = signature(step).bind(model_output, timestep, sample, *args, **options).arguments
        sigma, c = stochastic_part(scheduler, int(timestep), given.get("eta", 0.0))
        share = kept_share(sigma, c, correction.remaining())
        z = None if share == 1 else coming_noise(model_output, given)
        answer = step(model_output, timestep, sample, *args, **options)
        return answer if z is None else less_noisy(answer, (1 - share) * sigma * z)

    with stepping(scheduler, calmer):
        yield


def coming_noise(like: Tensor, given: dict[str, Any]) -> Tensor | None:
    """The noise z that the step is about to draw, or was given; unknown where it comes from no generator of the caller's."""
    if given.get("variance_noise") is not None or not given.get("generator"):
        return given.get("variance_noise")
    generators = (
        given["generator"] if isinstance(given["generator"], list) else [given["generator"]]
    )
    # A generator may stand in the list twice, and then goes on where it was.
    copies = {id(generator): copied(generator) for generator in generators}
    shape = like.shape if len(generators) == 1 else (1, *like.shape[1:])
    drawn = [
        torch.randn(shape, generator=copies[id(each)], device=each.device, dtype=like.dtype)
        for each in generators
    ]
    return torch.cat(drawn).to(like.device)


def copied(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())


def less_noisy(answer: Any, surplus: Tensor) -> Any:
    """A step's answer, a tuple or diffusers' own kind, with this much noise taken out of x'."""
    if isinstance(answer, tuple):
        return (answer[0] - surplus, *answer[1:])
    answer.prev_sample = answer.prev_sample - surplus
    return answer
