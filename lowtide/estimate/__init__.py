"""Before a run: how large the checkpoint will be, how much memory and time it takes, from the model's configuration alone.

    blueprint   the pipeline's configuration, its denoiser on the meta device
    size        the plan the recipe will arrive at, its skeleton, its file's header: exact
    work        multiply-adds, values and bytes of a pass, from the recorded graph
    speed       what this machine takes for each, measured in about a second
    stages      what each stage makes of them

Weights are counted as float32, which is how quantizing loads them. Memory is what comes on top of Python and its libraries.
"""

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowtide.costs import FLOAT, Cost, Network, Speed, Workload, measured
from lowtide.errors import BadInput
from lowtide.estimate.blueprint import Blueprint, read
from lowtide.estimate.size import checkpoint_bytes, planned
from lowtide.methods import recipe_of
from lowtide.settings import Settings, settings_from
from lowtide.stages.base import Recipe

WARM = 32 << 20  # bytes of torch's own buffers, once a network has run
FITTING = (8, 6, 4, 3, 2)
UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("", 1000), ("b", 1000), ("ib", 1024))
}


def predict(
    source: str,
    *,
    method: str = "best",
    without: Sequence[str] = (),
    fit: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Size, peak memory and time of `quantize` with the same options; `fit`, a size, chooses the bits of the weights."""
    settings, started = settings_from(options), time.perf_counter()
    limit = parse_size(fit) if fit else None
    recipe_of(method, settings, without)  # a mistake in the options is told before a model is read
    blueprint = read(source)
    network = Network(blueprint.adapter(settings))
    found: dict[str, Any] = {}
    if limit is not None:
        settings, found["fit"] = fitted(
            blueprint, network, settings, (method, tuple(without), limit)
        )
    recipe = recipe_of(method, settings, without)
    sizes = checkpoint_bytes(
        blueprint, planned(blueprint, network.adapter, recipe, settings, method)
    )
    load = workload(blueprint, network, settings, measured(network))
    named = {
        "model": source,
        "method": method,
        "weights": settings.weights,
        "inputs": settings.inputs,
    }
    named["options"] = settings.stages
    spent = {"speed": load.speed.rates(), "predicted_in": round(time.perf_counter() - started, 1)}
    return (
        named
        | found
        | {"size": sizes, "float_bytes": denoiser_bytes(network)}
        | priced(recipe, load, blueprint.others)
        | spent
    )


def workload(blueprint: Blueprint, network: Network, settings: Settings, speed: Speed) -> Workload:
    """What quantizing this pipeline has to do."""
    steps = len(blueprint.timesteps(settings))
    return Workload(network, settings, speed, steps=steps, branches=blueprint.branches(settings))


def fitted(
    blueprint: Blueprint, network: Network, settings: Settings, asked: tuple
) -> tuple[Settings, dict[str, Any]]:
    """The settings with the most bits that fit."""
    (method, without, limit), tried = asked, {}
    for bits in FITTING:
        chosen = replace(settings, weights=bits)
        recipe = recipe_of(method, chosen, without)
        tried[bits] = checkpoint_bytes(
            blueprint, planned(blueprint, network.adapter, recipe, chosen, method)
        )["total"]
        if tried[bits] <= limit:
            return chosen, {"limit": limit, "weights": bits, "tried": tried}
    least = min(tried, key=tried.get)
    raise BadInput(
        f"found no bits of weights that fit {limit:,} bytes",
        f"at least {tried[least]:,}, which {least}-bit weights take",
        "give more room with --fit, or choose a smaller model",
    )


def priced(recipe: Recipe, load: Workload, others: dict[str, int]) -> dict[str, Any]:
    """Each stage's seconds and peak, and those of the whole."""
    weights = denoiser_bytes(load.network) + sum(others.values())
    recorded = load.recorded_bytes()
    held = weights + recorded + load.network.whole.weights + WARM
    prices = [(type(stage).__name__, stage.cost(load)) for stage in recipe]
    costs = [(name, cost or Cost()) for name, cost in prices]
    stages = [
        {"name": name, "seconds": round(cost.seconds, 6), "peak_bytes": round(held + cost.bytes)}
        for name, cost in costs
    ]
    return {
        "stages": stages,
        "seconds": round(sum(cost.seconds for _, cost in costs), 1),
        "peak_bytes": max(stage["peak_bytes"] for stage in stages),
        "memory": {"weights": weights, "calls": round(recorded), "tape": load.settings.memory},
        "others": others,
        "unpriced": [name for name, cost in prices if cost is None],
    }


def totals(found: dict[str, Any]) -> dict[str, float]:
    """What a finished run is compared with, in the words of its own result."""
    stages = {stage["name"]: stage["seconds"] for stage in found["stages"]}
    whole = {
        "on_disk": found["size"]["total"],
        "peak_bytes": found["peak_bytes"],
        "minutes": round(found["seconds"] / 60, 2),
    }
    return whole | {"seconds": stages}


def denoiser_bytes(network: Network) -> int:
    return FLOAT * sum(parameter.numel() for parameter in network.adapter.meta.parameters())


def parse_size(text: str) -> int:
    """'4GiB', '500 MB', '1.5g' or plain bytes."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,6})?)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    if not match or match[2] not in UNITS or not (size := round(float(match[1]) * UNITS[match[2]])):
        raise BadInput(
            f"found size {text!r}", "a number and a unit, such as 4GiB, 500MB or 2.5G", "mend --fit"
        )
    return size
