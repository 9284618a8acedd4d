"""optimum-quanto: quantize, calibrate activation scales, freeze; HQQ for weights below 8 bits."""

import json
from pathlib import Path
from typing import Any

import torch
from optimum.quanto import (
    Calibration,
    HqqOptimizer,
    QModuleMixin,
    freeze,
    qint8,
    qtypes,
    quantization_map,
    quantize,
)
from safetensors.torch import save_file
from torch import nn

from peers.task import END_BITS, FLOAT, Held, Packed, Recipe, Task, Unable

PACKAGES = ("optimum-quanto",)


def weight_type(bits: int) -> Any:
    name = f"qint{bits}"
    if name not in qtypes:
        offered = sorted(each for each in qtypes if each.startswith("qint"))
        raise Unable(f"no {name}; it has {', '.join(offered)}")
    return qtypes[name]


def fit(task: Task, optimizer: Any = None) -> Packed:
    """Linear and Conv2d: quanto swaps both."""
    model = task.model
    inputs = qint8 if task.bits.quantized_inputs else None
    if task.bits.inputs < 8:
        raise Unable(f"activations are qint8 or float8, not {task.bits.inputs} bits")
    end = max(END_BITS, task.bits.weights)
    quantize(model, weights=weight_type(end), activations=inputs, include=task.ends)
    quantize(
        model,
        weights=weight_type(task.bits.weights),
        activations=inputs,
        optimizer=optimizer,
        include=task.inner,
    )
    if inputs:
        # Scales are a moving average: in the sampler's order they would fit the last steps alone.
        order = torch.randperm(len(task.calls), generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), Calibration():
            for place in order:
                model(**task.calls[place])
    freeze(model)
    note = "inputs: scales from calibration, per tensor" if inputs else ""
    return Packed(model, held(model), lambda folder: save(model, folder), note)


def held(model: nn.Module) -> dict[str, Held]:
    return {
        name: Held(layer.weight_qtype.bits, 8 if rounds_inputs(layer) else FLOAT)
        for name, layer in model.named_modules()
        if isinstance(layer, QModuleMixin)
    }


def rounds_inputs(layer: Any) -> bool:
    """Whether the layer rounds its input itself.

    QConv2d does not. It relies on the layer before it, and a norm or an activation undoes that.
    """
    return "input" in layer._quantize_hooks


def save(model: nn.Module, folder: Path) -> None:
    """As its documentation says: the state as safetensors, the quantization map as JSON."""
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "quantization_map.json").write_text(json.dumps(quantization_map(model)))


RECIPES = {
    "default optimizer": Recipe(fit),
    "HQQ": Recipe(lambda task: fit(task, HqqOptimizer()), lambda bits: bits.weights in (2, 4)),
}
