"""The top of the page: the verdict in a sentence, and a row of facts for each model."""

import math
from collections.abc import Callable

from lowtide.report.evidence import Evidence, GateResult, Measurement, Model
from lowtide.report.page.parts import Cell, Table
from lowtide.report.verdict import gate_words
from lowtide.report.wording import counted, figures, percent, seconds, size

Words = tuple[str, str, str]
Value = Callable[[Model], float]
_SAME = 0.03
_SIZE = ("smaller", "larger", "same size")
_PACE = ("faster", "slower", "as fast")


def sentence(model: Model, base: Model) -> str:
    """What the page says first: size, speed and likeness of a model."""
    words = ("smaller than", "larger than", "as large as")
    smaller = _compared(base.bytes / model.bytes, words, " times")
    faster = _compared(base.seconds_per_step / model.seconds_per_step, _PACE, " times")
    verdict = f"{model.name} is {smaller} {base.name} and {faster} a step."
    if math.isnan(model.psnr):
        return verdict
    psnr = model.metrics["psnr"]
    interval = f" (interval {_interval(psnr)})" if psnr.interval else ""
    likeness = f"{figures(psnr.value, 4)} dB PSNR to the original’s{interval}"
    count = counted(psnr.n, "image")
    return f"{verdict} From the same noise, its images keep {likeness} over {count}."


def _compared(ratio: float, words: Words, times: str = "×") -> str:
    """3.5× smaller, 1.2× larger, or the third of the words"""
    if abs(ratio - 1) < _SAME:
        return words[2]
    return f"{figures(max(ratio, 1 / ratio), 2)}{times} {words[ratio < 1]}"


def _interval(measurement: Measurement) -> str:
    return " to ".join(f"{end:.2f}" for end in measurement.interval or ())


def board(evidence: Evidence) -> Table:
    """Size, speed, PSNR and gates of each model."""
    heads = ["Model", "Size on disk", "Time a step", "PSNR", *(["Gates"] if evidence.gates else [])]
    rows = [_row(evidence, key)[: len(heads)] for key in evidence.models]
    return Table("Models", heads, rows, folded=False)


def _row(evidence: Evidence, key: str) -> list[Cell]:
    model = evidence.models[key]
    pace = seconds(model.seconds_per_step)
    about = "the original" if model is evidence.base else _description(model)
    return [
        Cell(model.name, about, colour=evidence.colour(key)),
        _against(evidence, model, lambda each: each.bytes, size(model.bytes), _SIZE),
        _against(evidence, model, lambda each: each.seconds_per_step, pace, _PACE),
        _psnr(evidence, model),
        _gates([gate for gate in evidence.gates if gate.model == key]),
    ]


def _description(model: Model) -> str:
    """The method, a profile other than full, and the share of the parameters in float."""
    profile = "" if model.profile in (None, "full") else f"profile {model.profile}"
    share = "" if model.float_share is None else f"{percent(model.float_share)} left in float"
    return ", ".join(filter(None, (model.method or model.kind, profile, share)))


def _against(evidence: Evidence, model: Model, value: Value, text: str, words: Words) -> Cell:
    """A model's value against the reference's, and a bar as long as its share of the largest."""
    bar = (0, value(model) / max(map(value, evidence.models.values())))
    if model is evidence.base:
        return Cell(text, bar=bar)
    return Cell(_compared(value(evidence.base) / value(model), words), text, bar=bar)


def _psnr(evidence: Evidence, model: Model) -> Cell:
    """PSNR, and its interval on a bar that holds the intervals of all models."""
    psnr = model.metrics.get("psnr")
    if psnr is None:
        return Cell(small="the reference" if model is evidence.base else "not measured")
    value = f"{figures(psnr.value, 4)} dB"
    if not psnr.interval:
        return Cell(value, "no interval")
    others = [each.metrics["psnr"] for each in evidence.others.values() if "psnr" in each.metrics]
    intervals = [other.interval for other in others if other.interval]
    least = min(low for low, _ in intervals)
    span = max(high for _, high in intervals) - least or 1.0
    low, high = psnr.interval
    return Cell(value, _interval(psnr), bar=((low - least) / span, (high - low) / span))


def _gates(gates: list[GateResult]) -> Cell:
    if not gates:
        return Cell(small="none set")
    passed = sum(gate.passed for gate in gates)
    partly = f"{passed} of {len(gates)} passed"
    word = partly if 0 < passed < len(gates) else "passed" if passed else "failed"
    lines = [gate_words(gate) + ("" if gate.passed else ": failed") for gate in gates]
    return Cell(word, "; ".join(lines), bad=passed < len(gates))
