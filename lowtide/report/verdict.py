"""The verdict of a comparison in the terminal: a column for each model, and the failed gates."""

import math
import shutil
import sys
from itertools import chain

from lowtide.report.evidence import Evidence, GateResult, Model
from lowtide.report.tables import table
from lowtide.report.wording import figures, metric_name, size

_NARROWEST = 100
_GATED = {"psnr": "PSNR", "lpips": "LPIPS", "fd-increase": "FD increase"}


def lines(evidence: Evidence) -> list[str]:
    """Models across, measurements down; in colour for a terminal."""
    models = list(evidence.models.values())
    base = evidence.base
    metrics = dict.fromkeys(chain.from_iterable(model.metrics for model in reversed(models)))
    rows = [
        ["size on disk", *(_weight(model, base) for model in models)],
        ["seconds a step", *(_pace(model, base) for model in models)],
        *([metric_name(name), *(_measure(each, name) for each in models)] for name in metrics),
        ["drift of the last sample", *map(_end, models)],
    ]
    return table(
        ["", *(model.name for model in models)],
        rows,
        title=evidence.title,
        right=True,
        width=max(_NARROWEST, shutil.get_terminal_size().columns),
        colour=sys.stdout.isatty(),
    )


def brief_result(model: Model) -> str:
    """tfmq W4A8: 0.612 MB, PSNR 33.5 dB"""
    psnr = "" if math.isnan(model.psnr) else f", PSNR {figures(model.psnr)} dB"
    return f"{model.name}: {size(model.bytes)}{psnr}"


def _weight(model: Model, base: Model) -> str:
    ratio = "" if model is base else f" ({model.bytes / base.bytes:.2f}x)"
    return size(model.bytes) + ratio


def _pace(model: Model, base: Model) -> str:
    ratio = model.seconds_per_step / base.seconds_per_step
    return f"{model.seconds_per_step:.3g}" + ("" if model is base else f" ({ratio:.2f}x)")


def _measure(model: Model, name: str) -> str:
    """The value and its interval."""
    measurement = model.metrics.get(name)
    if measurement is None or not math.isfinite(measurement.value):
        return ""
    interval = ""
    if measurement.interval:
        low, high = measurement.interval
        interval = f" ({low:.4g} to {high:.4g})"
    return f"{measurement.value:.4g}{interval}"


def _end(model: Model) -> str:
    """Relative L2 of the last sample."""
    return f"{model.trajectory.error[-1]:.3g}" if model.trajectory else ""


def failures(evidence: Evidence) -> list[str]:
    """One sentence for each failed gate."""
    return [
        f"gate failed: {evidence.models[gate.model].name}: {gate_words(gate)} required"
        for gate in evidence.gates
        if not gate.passed
    ]


def gate_words(gate: GateResult) -> str:
    """PSNR 26.16, at least 25"""
    side, _, metric = gate.name.partition("-")
    value = f"{gate.value:.4g}" if math.isfinite(gate.value) else "no number"
    bound = "at least" if side == "min" else "at most"
    return f"{_GATED.get(metric, metric)} {value}, {bound} {gate.limit:g}"
