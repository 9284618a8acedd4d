"""What a denoiser's error is made of, along its own sampling path, and what it does to the images.

An error that points the same way at every step and for every image adds up along the path. One
that does not mostly cancels. So the size of a single answer's error says little of the images, and
the steady part of it says more.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.evaluation.layer_drift import as_read_by, call
from lowtide.models import Adapter, answer_of
from lowtide.sampling.pipelines import Pipeline


@dataclass(frozen=True)
class Drawn:
    """The images of a model, and every call of its denoiser on the way."""

    images: np.ndarray
    calls: list[sampling.Moment]

    @property
    def path(self) -> np.ndarray:
        """The noisy sample at each step: (calls, samples, values)."""
        first = next(iter(self.calls[0].arguments))
        return np.stack([call.arguments[first].flatten(1).float().numpy() for call in self.calls])


def draw(pipe: Pipeline, request: sampling.Request) -> Drawn:
    """Sample one batch and record every call of the denoiser."""
    calls: list[sampling.Moment] = []
    with sampling.record_calls(sampling.denoiser(pipe), calls, None):
        images = sampling.run_pipeline(pipe, request)
    return Drawn(images, calls)


def image_error(images: np.ndarray, reference: np.ndarray) -> float:
    """Relative L2 of all images to the reference's, which lie around grey."""
    theirs = reference.astype(np.float64) - 0.5
    return float(np.linalg.norm(images - 0.5 - theirs) / np.linalg.norm(theirs))


@torch.no_grad()
def step_error(model: nn.Module, calls: Sequence[sampling.Moment]) -> float:
    """Relative L2 of the model's answers to those of the calls, same inputs, mean over calls.

    Errors of single steps neither add up nor cancel here. Along a trajectory they do, by decibels
    more or less from seed to seed.
    """
    answers = [answer_of(call(model, moment.arguments)).cpu() for moment in calls]
    pairs = zip(answers, calls, strict=True)
    return float(np.mean([_relative(ours, moment.eps) for ours, moment in pairs]))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@dataclass(frozen=True)
class ErrorParts:
    """The error of a model's answers on its own path, as shares of the float answers (relative L2).

    whole: of all answers.
    steady: its mean over images and steps, which all of them share.
    """

    whole: float
    steady: float


@torch.no_grad()
def error_parts(original: nn.Module, calls: Sequence[sampling.Moment]) -> ErrorParts:
    """Split the errors of recorded calls by the float model's answers to the same inputs."""
    squares = 0.0
    reference = 0.0
    means: list[Tensor] = []
    for moment in calls:
        theirs = answer_of(call(original, moment.arguments)).cpu().double()
        error = moment.eps.double() - theirs
        squares += float(error.square().sum())
        reference += float(theirs.square().sum())
        means.append(error.mean(0))
    answers = len(calls[0].eps) * len(means)
    steady = answers * float(torch.stack(means).mean(0).square().sum())
    return ErrorParts(whole=(squares / reference) ** 0.5, steady=(steady / reference) ** 0.5)


@dataclass(frozen=True)
class TemporalDamage:
    """The temporal features of a quantized model in a float network.

    features: the names of the layers whose outputs they are.
    timesteps: of the calls.
    errors: relative L2 of each feature at each call, (calls, features).
    images: what the float network draws with these features.
    """

    features: list[str]
    timesteps: list[float]
    errors: np.ndarray
    images: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.errors.mean())


def temporal_damage(
    pipe: Pipeline, packed: nn.Module, adapter: Adapter, request: sampling.Request
) -> TemporalDamage | None:
    """Draw with the float network and the temporal features of `packed`; None if it has none.

    At each call the packed denoiser reads the same inputs, and its features take the place of the
    float ones.
    """
    names: list[str] = []
    for unit in adapter.temporal():
        names += unit.features
    if not names:
        return None
    original = sampling.denoiser(pipe)
    rows: list[list[float]] = []
    with _features_of(packed, original, names, rows):
        drawn = draw(pipe, request)
    timesteps = [float(moment.t.flatten()[0]) for moment in drawn.calls]
    return TemporalDamage(names, timesteps, np.array(rows), drawn.images)


@contextmanager
def _features_of(
    packed: nn.Module, original: nn.Module, names: list[str], rows: list[list[float]]
) -> Iterator[None]:
    """Within the context, `original` computes with the features of `packed`.

    rows: gets the relative errors of the features, a row for each call.
    """
    features: dict[str, Tensor] = {}

    def remember(name: str):
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            features[name] = output

        return hook

    def replace(name: str):
        def hook(module: nn.Module, args: object, output: Tensor) -> Tensor:
            ours = features[name].to(output).expand_as(output)
            rows[-1].append(_relative(ours, output))
            return ours

        return hook

    @torch.no_grad()
    def run_packed(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        packed(*as_read_by(packed, args), **as_read_by(packed, kwargs))
        rows.append([])

    hooks = [original.register_forward_pre_hook(run_packed, with_kwargs=True)]
    for name in names:
        hooks.append(packed.get_submodule(name).register_forward_hook(remember(name)))
        hooks.append(original.get_submodule(name).register_forward_hook(replace(name)))
    try:
        with runtime.plain(packed):
            yield
    finally:
        for hook in hooks:
            hook.remove()
