"""lowtide itself, beside its peers."""

from functools import partial
from math import ceil
from pathlib import Path
from statistics import mean

import lowtide
from lowtide import sampling
from lowtide.formats import Affine, Mixed
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn.plan import Plan
from peers.task import END_BITS, FLOAT, Held, Packed, Recipe, Task

PACKAGES = ("lowtide",)
METHODS = ("minmax", "tfmq", "temporal_cache", "best")


def fit(task: Task, method: str) -> Packed:
    options = {
        "weights": task.bits.weights,
        "inputs": task.bits.inputs,
        "steps": task.steps,
        "iters": task.iters,
    }
    options |= {"images": task.images, **task.conditions}
    # The smaller file, for the schedule that is compared, where the model's block reads t alone.
    temporal = adapt(sampling.denoiser(task.pipe)).temporal()
    options["only_schedule"] = any(unit.reads == ("timestep",) for unit in temporal)
    result = lowtide.quantize(task.pipe, method=method, **relevant_options(method, options))
    replaced = len(gone(result.plan))
    note = f"tables of answers in the place of {replaced} of its layers" if replaced else ""
    return Packed(result.model, held(result.plan), lambda folder: save(result, folder), note)


def fit_while_loading(task: Task, group: int | None = None) -> Packed:
    """No calibration: diffusers loads the float denoiser, and lowtide packs what arrives."""
    bits = task.bits
    config = lowtide.LowtideConfig(weights=bits.weights, inputs=bits.inputs, group=group)
    place = {"subfolder": sampling.denoiser_name(task.pipe)}
    model = type(task.model).from_pretrained(task.source, quantization_config=config, **place)
    task.replace(model)
    note = "no calibration" + ("; inputs: by their own range" if bits.quantized_inputs else "")
    return Packed(model, held(model.hf_quantizer.plan), model.save_pretrained, note)


def held(plan: Plan) -> dict[str, Held]:
    """A layer that a table replaces holds no bits; the table counts in the bytes on disk."""
    stored = {
        name: Held(width(layer.weight), width(layer.input)) for name, layer in plan.layers.items()
    }
    return stored | {name: Held(0, 0) for name in gone(plan)}


def width(form: Affine | Mixed | None) -> int:
    """The bits of a format; the average, rounded up, where channels differ.

    OMQ gives one bit more to as many channels as it takes one bit from.
    """
    if isinstance(form, Mixed):
        return ceil(mean(form.bits))
    return form.bits if form else FLOAT


def gone(plan: Plan) -> list[str]:
    """Temporal layers replaced by tables of few bits, and the layers that served only them."""
    cached = [
        name
        for name, cache in plan.cached.items()
        if cache.format and not (cache.computed or cache.kept)
    ]
    return [*cached, *plan.blank] if cached else []


def save(result: lowtide.Quantized, folder: Path) -> None:
    result.model.save_pretrained(folder)


RECIPES = {method: Recipe(partial(fit, method=method)) for method in METHODS}
RECIPES["data-free"] = Recipe(fit_while_loading)
RECIPES["data-free in groups of 16"] = Recipe(
    partial(fit_while_loading, group=16), lambda bits: bits.weights < END_BITS
)
