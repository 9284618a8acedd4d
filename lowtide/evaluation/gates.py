"""Gates: bounds on metrics that every compared model must keep, and how `evaluate` gets them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from lowtide.errors import BadInput
from lowtide.report.evidence import GateResult
from lowtide.settings import EvaluationSettings, field_of_gate


@dataclass(frozen=True)
class Gate:
    """A bound on a metric; its limit comes from the user.

    at_least: the value must be at least the limit, else at most. over_reference: the value is the
    difference from the reference's.
    """

    metric: str
    at_least: bool = False
    over_reference: bool = False


GATES = {
    "min-psnr": Gate("psnr", at_least=True),
    "max-lpips": Gate("lpips"),
    "max-fd-increase": Gate("fd", over_reference=True),
}


def gate_results(
    limits: Mapping[str, float],
    values: Mapping[str, Mapping[str, float]],
    *,
    reference: str,
    full_name: Callable[[str], str],
) -> list[GateResult]:
    """Every gate for every model but the reference.

    limits: by the names of gates. values: by model, then by the full name of a metric.
    """
    results = []
    for name, limit in limits.items():
        gate = GATES[name]
        metric = full_name(gate.metric)
        base = values[reference][metric] if gate.over_reference else 0.0
        for model in (model for model in values if model != reference):
            value = values[model][metric] - base
            passed = value >= limit if gate.at_least else value <= limit
            result = GateResult(name=name, model=model, limit=limit, value=value, passed=passed)
            results.append(result)
    return results


def evaluation_settings(
    gates: Mapping[str, float] | None = None,
    **options: object,
) -> EvaluationSettings:
    """Settings from the arguments of `evaluate`: gates such as {"min-psnr": 25.0}, and fields."""
    limits = gates or {}
    if unknown := [name for name in limits if name not in GATES]:
        raise BadInput(
            f"found gate {unknown[0]!r}", f"one of {', '.join(GATES)}", "check the spelling"
        )
    names = [each.name for each in fields(EvaluationSettings)]
    if unknown := [name for name in options if name not in names]:
        raise BadInput(
            f"found option {unknown[0]!r}", f"one of {', '.join(names)}", "check the spelling"
        )
    values: dict[str, object] = dict(options)
    if isinstance(values.get("dataset"), Path):
        values["dataset"] = str(values["dataset"])
    values |= {field_of_gate(name): limit for name, limit in limits.items()}
    return replace(EvaluationSettings(), **values)
