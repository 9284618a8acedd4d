"""The top of the page: what came out, first in a sentence, then one line for each model."""

from datetime import datetime

from lowtide.report.page.evidence import Evidence, Gate, Measure, Model
from lowtide.report.page.markup import (
    NOTHING,
    Html,
    brief,
    counted,
    figures,
    join,
    percent,
    seconds,
    size,
    tag,
    times,
)
from lowtide.report.page.plot import percentage, swatch

SAME = 0.03
SIGNS = {"min": "at least", "max": "at most"}


def headline(evidence: Evidence) -> Html:
    return tag(
        "header",
        tag("h1", evidence.title),
        tag("p", sentence(evidence.lead, evidence.reference), class_="standfirst") if evidence.lead else None,
        tag("p", setting(evidence), class_="note"),
        tag("ul", join(line(evidence, model) for model in evidence.models), class_="board"),
        class_="headline",
    )


def sentence(model: Model, base: Model) -> str:
    """The first thing to know, in words."""
    parts = f"{model.name} is {comparison(base.bytes / model.bytes, 'smaller', 'larger', 'as large')} {base.name}"
    speed = comparison(base.seconds_per_step / model.seconds_per_step, "faster", "slower", "as fast")
    return f"{parts} and {speed.removesuffix(' than').removesuffix(' as')} a step. {likeness(model)}"


def comparison(ratio: float, more: str, less: str, same: str) -> str:
    if abs(ratio - 1) < SAME:
        return f"{same} as"
    return f"{figures(max(ratio, 1 / ratio), 2)} times {more if ratio > 1 else less} than"


def likeness(model: Model) -> str:
    psnr = model.metrics.get("psnr")
    if psnr is None:
        return ""
    interval = f" (interval {bounds(psnr)})" if psnr.low is not None and psnr.high is not None else ""
    count = f" over {counted(psnr.n, 'image')}" if psnr.n else ""
    return f"From the same noise, its images keep {psnr.value:.2f} dB PSNR to the original’s{interval}{count}."


def bounds(measure: Measure, digits: int = 2) -> str:
    return f"{measure.low:.{digits}f} to {measure.high:.{digits}f}"


def setting(evidence: Evidence) -> str:
    request = evidence.request
    parts = [counted(len(evidence.seeds), "seed")]
    if request.get("steps"):
        parts.append(counted(request["steps"], "sampling step"))
    if request.get("scheduler"):
        parts.append(str(request["scheduler"]).removesuffix("Scheduler"))
    if request.get("guidance") is not None:
        parts.append(f"guidance {request['guidance']:g}")
    if request.get("eta") is not None:
        parts.append(f"eta {request['eta']:g}")
    return ", ".join([*parts, day(evidence.date)])


def day(date: str) -> str:
    try:
        found = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{found.day} {found:%B %Y}"


def line(evidence: Evidence, model: Model) -> Html:
    gates = [gate for gate in evidence.gates if gate.model == model.key]
    return tag(
        "li",
        tag("div", tag("h2", swatch(evidence.number(model)), model.name), tag("p", described(evidence, model)), class_="who"),
        fact("Size", *sized(evidence, model)),
        fact("Time a step", *paced(evidence, model)),
        fact("PSNR", *kept(evidence, model)),
        fact("Gates", *gated(gates)) if evidence.gates else None,
    )


def described(evidence: Evidence, model: Model) -> str:
    if model is evidence.reference:
        return "the original"
    share = None if model.float_share is None else f"{percent(model.float_share)} left in float"
    profile = None if model.settings["profile"] in (None, "full") else f"profile {model.settings['profile']}"
    return ", ".join(filter(None, (model.settings["method"] or model.kind, profile, share)))


def fact(name: str, large: str, small: str | Html, extra: Html | None = None) -> Html:
    return tag("dl", tag("dt", name), tag("dd", tag("strong", large), tag("span", small), extra))


def sized(evidence: Evidence, model: Model) -> tuple[str, str, Html]:
    ratio = evidence.reference.bytes / model.bytes
    most = max(each.bytes for each in evidence.models)
    bar = tag("span", tag("i", style=f"width:{percentage(model.bytes / most)}"), class_="gauge", aria_hidden="true")
    if model is evidence.reference:
        return size(model.bytes), "on disk", bar
    return change(ratio, "smaller", "larger", "same size"), size(model.bytes), bar


def paced(evidence: Evidence, model: Model) -> tuple[str, str, Html]:
    most = max(each.seconds_per_step for each in evidence.models)
    bar = tag("span", tag("i", style=f"width:{percentage(model.seconds_per_step / most)}"), class_="gauge", aria_hidden="true")
    if model is evidence.reference:
        return seconds(model.seconds_per_step), "\u00a0", bar
    ratio = evidence.reference.seconds_per_step / model.seconds_per_step
    return change(ratio, "faster", "slower", "as fast"), seconds(model.seconds_per_step), bar


def change(ratio: float, more: str, less: str, same: str) -> str:
    return same if abs(ratio - 1) < SAME else f"{times(max(ratio, 1 / ratio))} {more if ratio > 1 else less}"


def kept(evidence: Evidence, model: Model) -> tuple[str, str, Html | None]:
    psnr = model.metrics.get("psnr")
    if psnr is None:
        return NOTHING, "the reference" if model is evidence.reference else "not measured", None
    if psnr.low is None or psnr.high is None:
        return f"{figures(psnr.value, 4)} dB", "no interval", None
    return f"{figures(psnr.value, 4)} dB", bounds(psnr), interval(evidence, psnr)


def interval(evidence: Evidence, psnr: Measure) -> Html:
    """Where this model's interval lies among all."""
    found = [model.metrics["psnr"] for model in evidence.models if "psnr" in model.metrics]
    low = min(each.value if each.low is None else each.low for each in found)
    high = max(each.value if each.high is None else each.high for each in found)
    span = (high - low) or 1.0
    place = f"left:{percentage((psnr.low - low) / span)};width:{percentage((psnr.high - psnr.low) / span)}"
    return tag("span", tag("i", style=place), class_="gauge", aria_hidden="true")


def gated(gates: list[Gate]) -> tuple[str, Html | str, Html | None]:
    if not gates:
        return NOTHING, "none set", None
    passed = sum(gate.passed for gate in gates)
    word = "passed" if passed == len(gates) else "failed" if passed == 0 else f"{passed} of {len(gates)} passed"
    return word, join(tag("span", gate_line(gate), class_="gate" if gate.passed else "gate bad") for gate in gates), None


def gate_line(gate: Gate) -> str:
    """min-psnr 25 -> PSNR 26.16, at least 25"""
    side, _, metric = gate.name.partition("-")
    bound = f"{SIGNS[side]} {brief(figures(gate.limit))}" if side in SIGNS else f"{gate.name} {brief(figures(gate.limit))}"
    short = metric.upper() if len(metric) < 6 else metric.replace("-", " ")
    return f"{short} {figures(gate.value, 4)}, {bound}{'' if gate.passed else ': failed'}"
