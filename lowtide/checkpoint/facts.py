"""What is known of a model, float or packed: units, layers, bits, bytes, kernels, calibrated steps."""

import hashlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import diffusers_hook, file_format
from lowtide.errors import BadInput
from lowtide.models import Adapter, Unit, adapt
from lowtide.nn.plan import LayerPlan, Plan
from lowtide.nn.split import split_modules
from lowtide.nn.swap import packed_layers
from lowtide.stages.base import Job


def kernels(model: nn.Module) -> dict[str, str]:
    """What runs each packed layer."""
    return {
        name: "plain torch (reference, no faster twin is registered)"
        for name, _ in packed_layers(model)
    }


def float_share(job: Job) -> float:
    """The share of the model's parameters that stays in float, biases aside."""
    coded = [
        math.prod(job.adapter.all_layers[name].weight.shape)
        for name, layer in job.plan.layers.items()
        if layer.weight
    ]
    biases = [
        module.bias.numel() for module in job.adapter.all_layers.values() if module.bias is not None
    ]
    gone = sum(job.adapter.all_layers[name].weight.numel() for name in gone_layers(job.plan))
    whole = (
        sum(parameter.numel() for parameter in job.adapter.meta.parameters()) - sum(biases) - gone
    )
    return 1 - sum(coded) / whole


def gone_layers(plan: Plan) -> list[str]:
    """Temporal layers that a cache took the place of."""
    return [
        *(name for name, cache in plan.cached.items() if not cache.computed and not cache.kept),
        *plan.blank,
    ]


def parameter_bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def on_disk(folder: Path) -> int:
    """Bytes of the denoiser's weight files."""
    homes = [home for name in ("unet", "transformer") if (home := folder / name).is_dir()] or [
        folder
    ]
    return sum(path.stat().st_size for path in homes[0].glob("*.safetensors"))


def check_steps(model: nn.Module, steps: int) -> None:
    """A packed model samples with the steps it knows."""
    if (asked := known_steps(model)) and steps != asked:
        way_out = f"use --steps {asked}, make one for {steps} with `lowtide reschedule`, or quantize again"
        raise BadInput(f"found {steps} steps", f"the {asked} it was calibrated for", way_out)


def known_steps(model: nn.Module) -> int | None:
    """How many steps a packed model was calibrated for, if anything in it depends on the step."""
    plan = packed_plan(model)
    return plan.summary["steps"] if plan.keyed else None


def packed_plan(model: nn.Module) -> Plan:
    """The plan of a packed model; an empty one for a float model, or one that others quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    return quantizer.plan if isinstance(quantizer, diffusers_hook.LowtideQuantizer) else Plan()


def inspect(source: str) -> dict[str, Any]:
    """Units, layers, bits and bytes of a model, float or packed."""
    pipe = sampling.load_pipeline(source)
    model = sampling.denoiser(pipe)
    folder, plan = sampling.local_folder(source), packed_plan(model)
    adapter = float_adapter(model, plan)
    return {
        "model": source,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in adapter.meta.parameters()),
        "units": [describe_unit(adapter, unit) for unit in adapter.units()],
        "layers": [describe_layer(adapter, name, plan) for name in adapter.layers()],
        "float": plan.left,
        "timesteps": list(plan.timesteps),
        "account": file_format.account(model)
        | {"ideal": ideal_bytes(adapter, plan)}
        | ({"on_disk": on_disk(folder)} if folder else {}),
    }


def float_adapter(model: nn.Module, plan: Plan) -> Adapter:
    """The architecture of a float or packed model, from the float model's shapes alone."""
    with torch.device("meta"):
        floating = type(model).from_config(model.config)
        split_modules(floating, plan.splits)
        return adapt(floating)


def describe_unit(adapter: Adapter, unit: Unit) -> dict[str, Any]:
    weights = sum(adapter.all_layers[name].weight.numel() for name in unit.layers)
    return {
        "name": unit.name,
        "kind": unit.kind,
        "layers": len(unit.layers),
        "reads": list(unit.reads),
        "weights": weights,
    }


def describe_layer(adapter: Adapter, name: str, plan: Plan) -> dict[str, Any]:
    weight, layer = adapter.all_layers[name].weight, plan.layers.get(name, LayerPlan(None, None))
    bits, inputs = (form.bits if form else 32 for form in (layer.weight, layer.input))
    return {
        "name": name,
        "shape": list(weight.shape),
        "weights": bits,
        "inputs": inputs,
        "per_step": layer.per_step,
    }


def ideal_bytes(adapter: Adapter, plan: Plan) -> int:
    """Bits times weights, with no table and no padding, and four bytes for every other parameter."""
    layers = {name: adapter.all_layers[name].weight.numel() for name in adapter.layers()}
    rest = sum(parameter.numel() for parameter in adapter.meta.parameters()) - sum(layers.values())
    layers = {name: count for name, count in layers.items() if name not in gone_layers(plan)}
    forms = {name: plan.layers[name].weight for name in layers if name in plan.layers}
    bits = {name: average_bits(forms.get(name)) for name in layers}
    return round(sum(count * bits[name] / 8 for name, count in layers.items())) + 4 * rest


def average_bits(form: Any) -> float:
    if form is None:
        return 32
    return sum(form.bits) / len(form.bits) if isinstance(form.bits, tuple) else form.bits


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights."""
    digest = hashlib.blake2b(digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {file_format.tensor_hash(tensor)}".encode())
    return digest.hexdigest()
