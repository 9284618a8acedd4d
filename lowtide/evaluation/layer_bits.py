"""Making: what a packed model is made of, layer by layer, and what its record tells of how it was made."""

from typing import Any

from lowtide.checkpoint import facts
from lowtide.evaluation.compared_models import OURS, Subject
from lowtide.nn.plan import LayerPlan


def made(subject: Subject) -> dict[str, Any]:
    """What lowtide knows of its own checkpoints; nothing of others."""
    if subject.kind != OURS:
        return {}
    summary = {name: subject.plan.summary[name] for name in ("weights", "inputs", "profile")}
    found = summary | {
        "method": subject.plan.method,
        "bits": bits(subject),
        "left": subject.plan.left,
    }
    return found | (recorded(subject.record.report) if subject.record else {})


def recorded(report: dict[str, Any]) -> dict[str, Any]:
    names = {"seconds": "stages", "float_share": "float_share"}
    found = {
        ours: report[theirs] for theirs, ours in names.items() if report.get(theirs) is not None
    }
    predicted = report.get("predicted") or {}
    return found | {"predicted": foretold(predicted), "real": foretold(report) if predicted else {}}


def foretold(told: dict[str, Any]) -> dict[str, float]:
    """The numbers that a run is predicted by, of its prediction or of itself."""
    names = {"on_disk": "bytes", "peak_bytes": "peak_bytes", "minutes": "minutes"}
    return {ours: told[theirs] for theirs, ours in names.items() if theirs in told}


def bits(subject: Subject) -> list[dict[str, Any]]:
    """Bits of each layer in forward order; layers that a cache took the place of are gone."""
    plan, kernels = subject.plan, facts.kernels(subject.model)
    adapter, gone = facts.float_adapter(subject.model, plan), set(facts.gone_layers(plan))
    units = {name: unit.name for unit in adapter.units() for name in unit.layers}
    return [
        {
            "name": name,
            "unit": units[name],
            **layer_bits(plan.layers.get(name, LayerPlan(None, None))),
            "parameters": layer.weight.numel(),
            "kernel": kernels.get(name),
        }
        for name, layer in adapter.layers().items()
        if name not in gone
    ]


def layer_bits(layer: LayerPlan) -> dict[str, float]:
    """Average bits per weight where they differ by channel."""
    return {
        "weights": facts.average_bits(layer.weight),
        "inputs": layer.input.bits if layer.input else 32,
    }
