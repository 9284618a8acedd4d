"""lowtide itself, beside its peers."""

from functools import partial
from pathlib import Path

import lowtide
from lowtide.plan import Plan
from peers.task import FLOAT, Held, Packed, Recipe, Task

PACKAGES = ("lowtide",)


def fit(task: Task, method: str) -> Packed:
    options = {"weights": task.bits.weights, "inputs": task.bits.inputs, "steps": task.steps, "iters": task.iters}
    result = lowtide.quantize(task.pipe, method=method, images=task.images, **options, **task.conditions)
    return Packed(result.model, held(result.plan), lambda folder: save(result, folder))


def held(plan: Plan) -> dict[str, Held]:
    bits = {name: [form.bits if form else FLOAT for form in (layer.weight, layer.input)] for name, layer in plan.layers.items()}
    return {name: Held(*both) for name, both in bits.items()}


def save(result: lowtide.Quantized, folder: Path) -> None:
    result.model.save_pretrained(folder)


RECIPES = {method: Recipe(partial(fit, method=method)) for method in ("minmax", "tfmq")}
