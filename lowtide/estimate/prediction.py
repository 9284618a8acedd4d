"""Predict what quantizing a model takes: size, memory and time, from its configuration alone."""

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lowtide.costs import FLOAT, Cost, Network, Speed, Workload, measured
from lowtide.errors import BadInput
from lowtide.estimate.blueprint import Blueprint, read
from lowtide.estimate.on_card import card_estimate, target_of, width_of
from lowtide.estimate.result import Estimate, FitChoice, MemoryEstimate, StageEstimate
from lowtide.estimate.size import checkpoint_bytes, planned
from lowtide.methods import recipe_of, with_profile
from lowtide.sampling.loading import DTYPES
from lowtide.settings import Settings, settings_from
from lowtide.stages.base import Recipe
from lowtide.validation import takes_options_of

WARM = 32 << 20  # bytes of torch's own buffers, once a network has run
FITTING = (8, 6, 4, 3, 2)  # bits of weights that `fit` tries
UNITS = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


@takes_options_of(Settings)
def plan(
    source: str,
    *,
    method: str = "best",
    without: Sequence[str] = (),
    fit: str | int | None = None,
    card: str | None = None,
    **options: object,
) -> Estimate:
    """Predict size, peak memory and time of `quantize` with the same options.

    Args:
        source: a hub id (only its configuration is fetched), a local diffusers folder, zoo:NAME.
        method: one of `lowtide.METHODS`.
        without: stages to leave out.
        fit: the most bytes of the checkpoint, 500000 or "500kB"; it chooses the weights' bits.
        card: a card to reckon for that need not be here, such as "rtx4090". With a `device` that
            is here, the plan is for that one, by probes.

    The other keywords are the fields of `lowtide.Settings`.

    Returns:
        Bytes of the checkpoint by kind, seconds and peak memory, in all and by stage, and memory
        on the accelerator if there is one.

    Examples:
        >>> import lowtide
        >>> estimate = lowtide.plan("zoo:digits", weights=4)
        >>> estimate.size["total"] < estimate.float_bytes / 4
        True
    """
    started = time.perf_counter()
    settings = with_profile(method, settings_from(options))
    limit = None if fit is None else parse_size(str(fit))
    # An error in the options is raised before a model is read.
    recipe_of(method, settings, without)
    target = target_of(settings.device, card)
    blueprint = read(source, DTYPES[settings.dtype])
    network = Network(blueprint.adapter(settings))
    subject = _Subject(blueprint, network, method, tuple(without))
    choice = None
    if limit is not None:
        choice = subject.fit(settings, limit)
        settings = replace(settings, weights=choice.weights)
    size = subject.size(settings)
    speed = target.speed(network, width_of(settings)) if target else measured(network)
    load = workload(blueprint, network, settings, speed, apart=target is not None)
    recipe = subject.recipe(settings)
    costs = _costs(recipe, load)
    stages = _stage_estimates(costs, load, blueprint.others)
    on_card = target and card_estimate(target, recipe, load, blueprint.others)
    moving = on_card.moving_seconds if on_card else 0
    return Estimate(
        model=source,
        method=method,
        weights=settings.weights,
        inputs=settings.inputs,
        options=settings.stages,
        fit=choice,
        size=size,
        float_bytes=denoiser_bytes(network),
        stages=stages,
        seconds=round(sum(cost.seconds for _, cost in costs if cost) + moving, 1),
        peak_bytes=max(stage.peak_bytes for stage in stages),
        memory=_memory(load, blueprint.others),
        others=blueprint.others,
        unpriced=tuple(name for name, cost in costs if cost is None),
        speed=load.speed.rates(),
        predicted_in=round(time.perf_counter() - started, 1),
        card=on_card,
    )


@dataclass(frozen=True)
class _Subject:
    """A model and the method that quantizes it."""

    blueprint: Blueprint
    network: Network
    method: str
    without: tuple[str, ...]

    def recipe(self, settings: Settings) -> Recipe:
        return recipe_of(self.method, settings, self.without)

    def size(self, settings: Settings) -> dict[str, int]:
        """Bytes of the checkpoint's weight file by kind, and in total."""
        recipe = self.recipe(settings)
        final = planned(self.blueprint, self.network.adapter, recipe, settings, self.method)
        return checkpoint_bytes(self.blueprint, final)

    def fit(self, settings: Settings, limit: int) -> FitChoice:
        """The most bits of weights whose checkpoint fits."""
        tried: dict[int, int] = {}
        for bits in FITTING:
            tried[bits] = self.size(replace(settings, weights=bits))["total"]
            if tried[bits] <= limit:
                return FitChoice(limit=limit, weights=bits, tried=tried)
        least = min(tried, key=lambda bits: tried[bits])
        raise BadInput(
            f"found no bits of weights that fit {limit:,} bytes",
            f"at least {tried[least]:,}, which {least}-bit weights take",
            "give more room with --fit, or choose a smaller model",
        )


def workload(
    blueprint: Blueprint,
    network: Network,
    settings: Settings,
    speed: Speed,
    *,
    apart: bool = False,
) -> Workload:
    """How much quantizing this pipeline has to do; `apart`: on an accelerator."""
    return Workload(
        network,
        settings,
        speed,
        steps=len(blueprint.timesteps(settings)),
        branches=blueprint.branches(settings),
        width=width_of(settings),
        apart=apart,
    )


def _costs(recipe: Recipe, load: Workload) -> list[tuple[str, Cost | None]]:
    """Each stage's name and cost; None where no cost is known."""
    return [(type(stage).__name__, stage.cost(load)) for stage in recipe]


def _stage_estimates(
    costs: list[tuple[str, Cost | None]], load: Workload, others: dict[str, int]
) -> tuple[StageEstimate, ...]:
    memory = _memory(load, others)
    held = memory.weights + load.recorded_bytes() + load.network.whole.weights + WARM
    stages: list[StageEstimate] = []
    for name, known in costs:
        cost = known or Cost()
        peak = round(held + (memory.tape if load.apart else cost.bytes))
        stages.append(StageEstimate(name, seconds=round(cost.seconds, 6), peak_bytes=peak))
    return tuple(stages)


def _memory(load: Workload, others: dict[str, int]) -> MemoryEstimate:
    return MemoryEstimate(
        weights=(denoiser_bytes(load.network) + sum(others.values())) * load.width // FLOAT,
        calls=round(load.recorded_bytes()),
        tape=load.settings.memory,
    )


def denoiser_bytes(network: Network) -> int:
    """Bytes of the denoiser in float32."""
    return FLOAT * sum(parameter.numel() for parameter in network.adapter.meta.parameters())


def parse_size(text: str) -> int:
    """Bytes of '4GiB', '500 MB', '1.5g' or a plain number."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    size = round(float(match[1]) * UNITS.get(match[2], 0)) if match else 0
    if not size:
        raise BadInput(
            f"found size {text!r}",
            "a number and a unit, such as 4GiB, 500MB or 2.5G",
            "correct --fit",
        )
    return size
