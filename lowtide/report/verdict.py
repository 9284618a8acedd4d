"""The verdict of a comparison in the terminal: a column for each model, and the failed gates."""

import shutil
import sys
from collections.abc import Iterable
from typing import Any

from lowtide.report.tables import table
from lowtide.report.wording import metric_name, size

Json = dict[str, Any]
_NARROWEST = 100
_GATED = {"psnr": "PSNR", "lpips": "LPIPS", "fd-increase": "FD increase"}


def lines(evidence: Json) -> list[str]:
    """Models across, measurements down, and the path of the report; in colour for a terminal."""
    models = list(evidence["models"].values())
    reference = evidence["models"][evidence["reference"]]
    metrics = dict.fromkeys(name for model in reversed(models) for name in model["metrics"])
    rows = [
        ["size on disk", *(_weight(model, reference) for model in models)],
        ["seconds a step", *(_pace(model, reference) for model in models)],
        *([metric_name(name), *(_measure(each, name) for each in models)] for name in metrics),
        ["drift of the last sample", *map(_end, models)],
    ]
    grid = table(
        ["", *(model["name"] for model in models)],
        rows,
        title=evidence["title"],
        right=True,
        width=max(_NARROWEST, shutil.get_terminal_size().columns),
        colour=sys.stdout.isatty(),
    )
    return [*grid, f"report: {evidence['report']}"]


def _weight(model: Json, reference: Json) -> str:
    return size(model["bytes"]) + _ratio(model, reference, "bytes")


def _pace(model: Json, reference: Json) -> str:
    ratio = _ratio(model, reference, "seconds_per_step")
    return f"{model['seconds_per_step']:.3g}{ratio}"


def _ratio(model: Json, reference: Json, key: str) -> str:
    return "" if model is reference else f" ({model[key] / reference[key]:.2f}x)"


def _measure(model: Json, name: str) -> str:
    """The value and its interval."""
    measure = model["metrics"].get(name)
    if measure is None or measure["value"] is None:
        return ""
    low = measure.get("low")
    interval = "" if low is None else f" ({low:.4g} to {measure['high']:.4g})"
    return f"{measure['value']:.4g}{interval}"


def _end(model: Json) -> str:
    """Relative L2 of the last sample."""
    path = model.get("trajectory")
    return f"{path['error'][-1]:.3g}" if path else ""


def failures(evidence: Json) -> list[str]:
    """One sentence for each failed gate."""
    return [_sentence(gate, evidence["models"]) for gate in _failed(evidence["gates"])]


def _failed(gates: Iterable[Json]) -> list[Json]:
    return [gate for gate in gates if not gate["passed"]]


def _sentence(gate: Json, models: Json) -> str:
    side, _, metric = gate["name"].partition("-")
    bound = f"at {'least' if side == 'min' else 'most'} {gate['limit']:g} asked"
    value = "no number" if gate["value"] is None else f"{gate['value']:.4g}"
    name = models[gate["model"]]["name"]
    return f"gate failed: {name}: {_GATED.get(metric, metric)} {value}, {bound}"
