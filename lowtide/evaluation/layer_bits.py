"""Layer bits: the formats of a packed model's layers, and what its record says of the run."""

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace
from torch import Tensor, nn

from lowtide.checkpoint import facts
from lowtide.evaluation.compared_models import LOWTIDE, ComparedModel
from lowtide.evaluation.layer_drift import unit_names
from lowtide.nn.plan import LayerPlan
from lowtide.report.evidence import LayerBits, Model

_FLOAT_LAYER = LayerPlan(None, None)


def with_contents(evidence: Model, model: ComparedModel) -> Model:
    """The evidence with the contents of lowtide's own checkpoint; other models have none."""
    if model.kind != LOWTIDE:
        return evidence
    summary = model.plan.summary
    contents = replace(
        evidence,
        weights=summary["weights"],
        inputs=summary["inputs"],
        profile=summary["profile"],
        method=model.plan.method,
        bits=_layer_bits(model),
        left=model.plan.left,
    )
    return _with_costs(contents, model.record.report) if model.record else contents


def _with_costs(evidence: Model, report: Mapping[str, Any]) -> Model:
    """What the record says of the run: seconds by stage, and predicted beside measured costs."""
    predicted = report.get("predicted") or {}
    return replace(
        evidence,
        stages=report.get("seconds"),
        float_share=report.get("float_share"),
        predicted=_costs(predicted),
        real=_costs(report) if predicted else {},
    )


def _costs(report: Mapping[str, float]) -> dict[str, float]:
    """Size, peak memory and time, of a prediction or of a run."""
    names = {"on_disk": "bytes", "peak_bytes": "peak_bytes", "minutes": "minutes"}
    return {name: report[entry] for entry, name in names.items() if entry in report}


def _layer_bits(model: ComparedModel) -> list[LayerBits]:
    """The layers in forward order, without those that a cache replaced."""
    plan = model.plan
    kernels = facts.kernels(model.denoiser)
    adapter = facts.float_adapter(model.denoiser, plan)
    units = unit_names(adapter)
    gone = set(facts.replaced_layers(plan))
    return [
        _bits_of(name, units[name], layer, plan.layers.get(name, _FLOAT_LAYER), kernels)
        for name, layer in adapter.layers().items()
        if name not in gone
    ]


def _bits_of(
    name: str, unit: str, layer: nn.Module, plan: LayerPlan, kernels: Mapping[str, str]
) -> LayerBits:
    assert isinstance(layer.weight, Tensor), "a layer has a weight"
    return LayerBits(
        name=name,
        unit=unit,
        weights=facts.average_bits(plan.weight),
        inputs=facts.average_bits(plan.input),
        parameters=layer.weight.numel(),
        kernel=kernels.get(name),
    )
