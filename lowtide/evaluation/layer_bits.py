"""Layer bits: the formats of a packed model's layers, and what its record says of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowtide.checkpoint import facts
from lowtide.evaluation.compared_models import LOWTIDE, ComparedModel
from lowtide.evaluation.layer_drift import unit_names
from lowtide.nn.plan import LayerPlan

_FLOAT_LAYER = LayerPlan(None, None)


@dataclass(frozen=True)
class LayerWidth:
    """One layer: bits per weight (the average where channels differ), bits per input, size."""

    name: str
    unit: str
    weights: float
    inputs: float
    parameters: int
    kernel: str | None


@dataclass(frozen=True)
class RunCosts:
    """What the record says of the run: seconds by stage, and predicted beside measured costs."""

    stages: dict[str, float] | None
    float_share: float | None
    predicted: dict[str, float]
    real: dict[str, float]


@dataclass(frozen=True)
class CheckpointContents:
    """What lowtide knows of its own checkpoint; `left`: the layers in float, each with a reason."""

    weights: int
    inputs: int
    profile: str
    method: str
    bits: list[LayerWidth]
    left: dict[str, str]
    costs: RunCosts | None


def checkpoint_contents(model: ComparedModel) -> CheckpointContents | None:
    """The contents of lowtide's own checkpoint; None for other models."""
    if model.kind != LOWTIDE:
        return None
    summary: Mapping[str, Any] = {**model.plan.summary}
    return CheckpointContents(
        weights=summary["weights"],
        inputs=summary["inputs"],
        profile=summary["profile"],
        method=model.plan.method,
        bits=_layer_widths(model),
        left=model.plan.left,
        costs=_run_costs(model.record.report) if model.record else None,
    )


def _run_costs(report: Mapping[str, Any]) -> RunCosts:
    predicted = report.get("predicted") or {}
    return RunCosts(
        stages=report.get("seconds"),
        float_share=report.get("float_share"),
        predicted=_costs(predicted),
        real=_costs(report) if predicted else {},
    )


def _costs(report: Mapping[str, Any]) -> dict[str, float]:
    """Size, peak memory and time, of a prediction or of a run."""
    names = {"on_disk": "bytes", "peak_bytes": "peak_bytes", "minutes": "minutes"}
    return {name: report[entry] for entry, name in names.items() if entry in report}


def _layer_widths(model: ComparedModel) -> list[LayerWidth]:
    """The layers in forward order, without those that a cache replaced."""
    plan = model.plan
    kernels = facts.kernels(model.denoiser)
    adapter = facts.float_adapter(model.denoiser, plan)
    units = unit_names(adapter)
    gone = set(facts.replaced_layers(plan))
    return [
        _layer_width(name, units[name], layer, plan.layers.get(name, _FLOAT_LAYER), kernels)
        for name, layer in adapter.layers().items()
        if name not in gone
    ]


def _layer_width(
    name: str, unit: str, layer: nn.Module, plan: LayerPlan, kernels: Mapping[str, str]
) -> LayerWidth:
    assert isinstance(layer.weight, Tensor), "a layer has a weight"
    return LayerWidth(
        name=name,
        unit=unit,
        weights=facts.average_bits(plan.weight),
        inputs=facts.average_bits(plan.input),
        parameters=layer.weight.numel(),
        kernel=kernels.get(name),
    )
