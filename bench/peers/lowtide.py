"""lowtide itself, beside its peers."""

from functools import partial
from math import ceil
from pathlib import Path
from statistics import mean

import lowtide
from lowtide.formats import Affine, Mixed
from lowtide.nn.plan import Plan
from peers.task import FLOAT, Held, Packed, Recipe, Task

PACKAGES = ("lowtide",)
METHODS = ("minmax", "tfmq", "temporal_cache", "best")


def fit(task: Task, method: str) -> Packed:
    options = {
        "weights": task.bits.weights,
        "inputs": task.bits.inputs,
        "steps": task.steps,
        "iters": task.iters,
    }
    result = lowtide.quantize(
        task.pipe, method=method, images=task.images, **options, **task.conditions
    )
    note = (
        f"tables of answers in the place of {len(gone(result.plan))} of its layers"
        if gone(result.plan)
        else ""
    )
    return Packed(result.model, held(result.plan), lambda folder: save(result, folder), note)


def held(plan: Plan) -> dict[str, Held]:
    """A layer that is gone holds no bits; the tables that answer for it count in the bytes."""
    bits = {
        name: [width(form) for form in (layer.weight, layer.input)]
        for name, layer in plan.layers.items()
    }
    return {name: Held(*both) for name, both in bits.items()} | {
        name: Held(0, 0) for name in gone(plan)
    }


def width(form: Affine | Mixed | None) -> int:
    """Of a layer whose channels differ, the average, rounded up: OMQ gives as many a bit more as it takes one from."""
    if isinstance(form, Mixed):
        return ceil(mean(form.bits))
    return form.bits if form else FLOAT


def gone(plan: Plan) -> list[str]:
    """Temporal layers whose answers are all cached in few bits, and those that only these listened to."""
    cached = [
        name
        for name, cache in plan.cached.items()
        if cache.format and not (cache.computed or cache.kept)
    ]
    return [*cached, *plan.blank] if cached else []


def save(result: lowtide.Quantized, folder: Path) -> None:
    result.model.save_pretrained(folder)


RECIPES = {method: Recipe(partial(fit, method=method)) for method in METHODS}
