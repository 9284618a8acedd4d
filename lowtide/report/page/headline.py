"""The top of the page: the verdict in a sentence, and a row of facts for each model."""

import math

from lowtide.report.evidence import Bound, Evidence, Measure, Model
from lowtide.report.page.parts import Cell, Table
from lowtide.report.wording import NOTHING, brief, counted, day, figures, percent, seconds, size

_SAME = 0.03
_PACE = ("faster", "slower", "as fast")
_SIDES = {"min": "at least", "max": "at most"}


def sentence(model: Model, base: Model) -> str:
    """What the page says first: size, speed and likeness of a model."""
    words = ("smaller than", "larger than", "as large as")
    smaller = _compared(base.bytes / model.bytes, words, " times")
    faster = _compared(base.seconds_per_step / model.seconds_per_step, _PACE, " times")
    verdict = f"{model.name} is {smaller} {base.name} and {faster} a step."
    psnr = model.metrics.get("psnr")
    if psnr is None or math.isnan(psnr.value):
        return verdict
    interval = f" (interval {_bounds(psnr)})" if _bounds(psnr) else ""
    count = f" over {counted(psnr.n, 'image')}" if psnr.n else ""
    value = f"{figures(psnr.value, 4)} dB PSNR"
    likeness = f"its images keep {value} to the original’s{interval}{count}"
    return f"{verdict} From the same noise, {likeness}."


def _compared(ratio: float, words: tuple[str, str, str], times: str = "×") -> str:
    if abs(ratio - 1) < _SAME:
        return words[2]
    return f"{figures(max(ratio, 1 / ratio), 2)}{times} {words[ratio < 1]}"


def _bounds(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return ""
    return f"{measure.low:.2f} to {measure.high:.2f}"


def setting(evidence: Evidence) -> str:
    """Seeds, sampler and date in one line."""
    request = {key: value for key, value in evidence.request.items() if value is not None}
    parts = [counted(len(evidence.seeds), "seed")]
    parts += [f"{request['steps']} sampling steps"] if "steps" in request else []
    parts += [str(request.get("scheduler", "")).removesuffix("Scheduler")]
    parts += [f"{name} {request[name]:g}" for name in ("guidance", "eta") if name in request]
    return ", ".join(filter(None, [*parts, day(evidence.date)]))


def board(evidence: Evidence) -> Table:
    """Size, speed, PSNR and gates of each model."""
    heads = ["Model", "Size", "Time a step", "PSNR", "Gates"]
    heads = heads if evidence.gates else heads[:-1]
    rows = [_row(evidence, model)[: len(heads)] for model in evidence.models]
    return Table("Models", heads, rows, folded=False)


def _row(evidence: Evidence, model: Model) -> list[Cell]:
    gates = [gate for gate in evidence.gates if gate.model == model.key]
    sizes = [each.bytes for each in (model, evidence.reference, *evidence.models)]
    paces = [each.seconds_per_step for each in (model, evidence.reference, *evidence.models)]
    return [
        Cell(model.name, _description(evidence, model), colour=evidence.colour(model)),
        _against(sizes, size(model.bytes), "on disk", ("smaller", "larger", "same size")),
        _against(paces, seconds(model.seconds_per_step), "a step", _PACE),
        _psnr(evidence, model),
        _gates(gates),
    ]


def _against(values: list[float], text: str, unit: str, words: tuple[str, str, str]) -> Cell:
    """`values`: the model's own, the reference's, then all, for a bar as long as its share."""
    own, base, *everyone = values
    ratio = _compared(base / own, words)
    bar = (0, own / max(everyone))
    return Cell(text, unit, bar=bar) if own == base else Cell(ratio, f"{text} {unit}", bar=bar)


def _description(evidence: Evidence, model: Model) -> str:
    """The method, a profile other than full, and the share of the parameters in float."""
    if model is evidence.reference:
        return "the original"
    profile = "" if model.profile in (None, "full") else f"profile {model.profile}"
    share = "" if model.float_share is None else f"{percent(model.float_share)} left in float"
    return ", ".join(filter(None, (model.method or model.kind, profile, share)))


def _psnr(evidence: Evidence, model: Model) -> Cell:
    """PSNR, and its interval on a bar that holds the intervals of all models."""
    psnr = model.metrics.get("psnr")
    if psnr is None:
        return Cell(NOTHING, "the reference" if model is evidence.reference else "not measured")
    value = f"{figures(psnr.value, 4)} dB"
    if psnr.low is None or psnr.high is None:
        return Cell(value, "no interval")
    measures = [each.metrics["psnr"] for each in evidence.models if "psnr" in each.metrics]
    ends = [
        end for each in measures for end in (each.low, each.high, each.value) if end is not None
    ]
    span = (max(ends) - min(ends)) or 1.0
    bar = ((psnr.low - min(ends)) / span, (psnr.high - psnr.low) / span)
    return Cell(value, _bounds(psnr), bar=bar)


def _gates(gates: list[Bound]) -> Cell:
    if not gates:
        return Cell(NOTHING, "none set")
    passed = sum(gate.passed for gate in gates)
    partly = f"{passed} of {len(gates)} passed"
    word = partly if 0 < passed < len(gates) else "passed" if passed else "failed"
    return Cell(word, "; ".join(map(_gate_line, gates)), bad=passed < len(gates))


def _gate_line(gate: Bound) -> str:
    """min-psnr 25 -> PSNR 26.16, at least 25"""
    side, _, metric = gate.name.partition("-")
    bound = f"{_SIDES.get(side, gate.name)} {brief(figures(gate.limit))}"
    name = metric.upper() if len(metric) < 6 else metric.replace("-", " ")
    return f"{name} {figures(gate.value, 4)}, {bound}{'' if gate.passed else ': failed'}"
