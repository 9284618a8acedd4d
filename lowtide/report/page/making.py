"""How the models were made: bits layer by layer, where the time went, what was foretold, what stayed in float."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

from lowtide.report.page.evidence import Bits, Evidence, Model
from lowtide.report.page.heat import picker, place_name, spans, stages
from lowtide.report.page.markup import (
    NOTHING,
    Html,
    counted,
    figures,
    join,
    lasting,
    percent,
    size,
    tag,
)
from lowtide.report.page.plot import percentage

LEAST_WIDTH = 0.004
GAP = 0.11
MARKS = (2, 4, 8, 16, 32)
FLOAT = 16
IN_FLOAT = "in float"
FOLDED = 6
FARTHEST = 4
FORETOLD = {"bytes": ("Size on disk", size), "peak_bytes": ("Peak memory", size), "minutes": ("Time", lambda m: lasting(60 * m))}


def bits(evidence: Evidence) -> Html | None:
    """A bar for each layer in forward order: as wide as it has parameters, as high as it has bits."""
    found = [model for model in evidence.others if model.bits]
    if not found:
        return None
    panels = [bits_panel(model) for model in found]
    return tag("figure", picker([model.name for model in found], "bits"), join(panels), class_="bits", data_panels="bits")


def bits_panel(model: Model) -> Html:
    widths = shares([layer.parameters for layer in model.bits])
    top = highest(model.bits)
    marks = [mark for mark in MARKS if mark <= top]
    strip = tag(
        "div",
        join(tag("span", str(mark), class_="tick y", style=f"top:{percentage(1 - mark / top)}") for mark in marks),
        tag("div", drawing(model.bits, widths, top, marks), class_="cells"),
        class_="strip",
        role="img",
        aria_label=f"Bits of the {len(model.bits)} layers of {model.name}: {spoken(model.bits)}",
    )
    below = stages(spans([layer.unit for layer in model.bits], widths))
    return tag(
        "div",
        tag("p", model.name, class_="panel-name"),
        strip,
        below,
        tag("p", key(model), class_="note"),
        listed(model),
        class_="panel",
    )


def highest(layers: Sequence[Bits]) -> float:
    """The top of the strip: float layers fill it and do not set it, or four bits beside them would be slivers."""
    found = [bits for layer in layers for bits in (layer.weights, layer.inputs or 0) if 0 < bits < FLOAT]
    return max(found, default=FLOAT)


def shares(parameters: Sequence[int]) -> list[float]:
    """Parts of the axis, in proportion, but none so thin that it cannot be seen."""
    total = sum(parameters) or 1
    least = min(LEAST_WIDTH, 0.5 / len(parameters))
    widths = [max(count / total, least) for count in parameters]
    return [width / sum(widths) for width in widths]


def drawing(layers: Sequence[Bits], widths: Sequence[float], top: float, marks: Sequence[int]) -> Html:
    """In percent of the strip; a hairline of paper parts layers, a wider one units."""
    rules = [tag("path", d=f"M0 {100 * (1 - mark / top):.2f}H100", class_="hair") for mark in marks]
    bars, at = [], 0.0
    for layer, width, after in zip(layers, widths, [*layers[1:], None], strict=True):
        gap = GAP if after and after.unit == layer.unit else 3 * GAP
        bars.append(bar(layer, at * 100, width * 100 - min(gap, width * 25), top))
        at += width
    return tag(
        "svg", join(rules), join(bars), viewBox="0 0 100 100", preserveAspectRatio="none", aria_hidden="true", focusable="false"
    )


def bar(layer: Bits, left: float, width: float, top: float) -> Html:
    high = min(100.0, 100 * layer.weights / top)
    shape = tag("rect", x=f"{left:.3f}", y=f"{100 - high:.2f}", width=f"{width:.3f}", height=f"{high:.2f}", class_=shade(layer))
    mark = None
    if layer.inputs and layer.inputs < FLOAT:
        mark = tag("path", d=f"M{left:.3f} {100 * (1 - layer.inputs / top):.2f}h{width:.3f}", class_="inputs")
    return tag("g", tag("title", told(layer)), shape, mark, data_tip=told(layer))


def shade(layer: Bits) -> str:
    return "float" if layer.weights >= FLOAT else f"w{min(8, max(1, round(layer.weights)))}"


def told(layer: Bits) -> str:
    kernel = f", {layer.kernel}" if layer.kernel else ""
    return f"{layer.name}: {pair(layer)}, {counted(layer.parameters, 'parameter')}{kernel}"


def pair(layer: Bits) -> str:
    """W4A8, or that it is in float."""
    if layer.weights >= FLOAT:
        return IN_FLOAT
    return f"W{layer.weights:g}" + ("" if layer.inputs is None else f"A{layer.inputs:g}")


def spoken(layers: Sequence[Bits]) -> str:
    """36 layers at W4A8, 2 layers in float"""
    found = Counter(pair(layer) for layer in layers).most_common()
    return ", ".join(f"{counted(count, 'layer')} {'' if bits == IN_FLOAT else 'at '}{bits}" for bits, count in found)


def key(model: Model) -> str:
    total = sum(layer.parameters for layer in model.bits) or 1
    mean = sum(layer.weights * layer.parameters for layer in model.bits) / total
    return f"{spoken(model.bits)}; {figures(mean)} bits per weight on average."


def listed(model: Model) -> Html:
    """The same as a table, for those who read and search."""
    rows = (
        tag(
            "tr",
            tag("th", layer.name, scope="row"),
            join(tag("td", text) for text in (f"{layer.weights:g}", NOTHING if layer.inputs is None else f"{layer.inputs:g}")),
            tag("td", f"{layer.parameters:,}"),
            tag("td", layer.kernel or NOTHING),
        )
        for layer in model.bits
    )
    heads = join(tag("th", text, scope="col") for text in ("Layer", "Weights", "Inputs", "Parameters", "Kernel"))
    table = tag("table", tag("thead", tag("tr", heads)), tag("tbody", join(rows)), class_="plain")
    return tag(
        "details",
        tag("summary", f"All {len(model.bits)} layers"),
        tag("div", table, class_="scrolls", tabindex="0", role="region", aria_label=f"Layers of {model.name}"),
    )


def time(evidence: Evidence) -> Html | None:
    """A bar for each model, as long as it took, parted by stage."""
    found = [model for model in evidence.others if sum(model.stages.values()) > 0]
    if not found:
        return None
    names = list(dict.fromkeys(name for model in found for name in model.stages))
    longest = max(sum(model.stages.values()) for model in found)
    return tag("div", join(spent(model, names, longest) for model in found), class_="time")


def spent(model: Model, names: Sequence[str], longest: float) -> Html:
    total = sum(model.stages.values())
    order = sorted((name for name in model.stages if model.stages[name] > 0), key=lambda name: -model.stages[name])
    parts = [
        tag(
            "i",
            class_=f"part p{names.index(name) % 8}",
            style=f"width:{percentage(model.stages[name] / longest)}",
            data_tip=words(model, name),
        )
        for name in names
        if model.stages.get(name, 0) > 0
    ]
    entries = (tag("li", tag("i", class_=f"part p{names.index(name) % 8}"), words(model, name)) for name in order)
    head = tag("p", tag("strong", model.name), f" took {lasting(total)}", class_="panel-name shown")
    return tag("div", head, tag("div", join(parts), class_="stack", aria_hidden="true"), tag("ul", join(entries), class_="key"))


def words(model: Model, name: str) -> str:
    share = model.stages[name] / sum(model.stages.values())
    return f"{name} {lasting(model.stages[name])}, {percent(share)}"


def foretold(evidence: Evidence) -> Html | None:
    """Prediction against what came out, and the ratio of the two."""
    rows = [row for model in evidence.others for row in foretold_rows(model)]
    if not rows:
        return None
    heads = join(tag("th", text, scope="col") for text in ("", "Predicted", "Real", "Real to predicted", ""))
    table = tag("table", tag("thead", tag("tr", heads)), tag("tbody", join(rows)), class_="plain foretold")
    return tag("div", table, class_="scrolls", tabindex="0", role="region", aria_label="Predicted against real")


def foretold_rows(model: Model) -> list[Html]:
    both = [name for name in FORETOLD if model.predicted.get(name) and model.real.get(name)]
    return [tag("tr", tag("th", model.name, scope="rowgroup", colspan=5), class_="group")] * bool(both) + [
        foretold_row(*FORETOLD[name], model.predicted[name], model.real[name]) for name in both
    ]


def foretold_row(title: str, write: Callable[[float], str], predicted: float, real: float) -> Html:
    """The mark lies in the middle where the prediction was right, at the ends where it was off by four."""
    ratio = real / predicted
    place = percentage(min(1.0, max(0.0, 0.5 + math.log(ratio, FARTHEST) / 2)))
    mark = tag("span", tag("i", style=f"left:{place}"), class_="scale", aria_hidden="true")
    return tag(
        "tr",
        tag("th", title, scope="row"),
        tag("td", write(predicted)),
        tag("td", write(real)),
        tag("td", f"{figures(ratio)}×"),
        tag("td", mark),
    )


def left(evidence: Evidence) -> Html | None:
    """Reasons, and the layers that share each; models alike are told once."""
    found: dict[tuple[tuple[str, str], ...], list[Model]] = {}
    for model in evidence.others:
        if model.left:
            found.setdefault(tuple(model.left.items()), []).append(model)
    return join(left_in(models) for models in found.values()) if found else None


def left_in(models: Sequence[Model]) -> Html:
    reasons: dict[str, list[str]] = {}
    for name, why in models[0].left.items():
        reasons.setdefault(why, []).append(name)
    share = models[0].float_share
    parameters = "" if share is None else f", {percent(share)} of the parameters that are not biases"
    head = tag(
        "p", tag("strong", " and ".join(model.name for model in models)), f": {counted(len(models[0].left), 'layer')}{parameters}"
    )
    entries = join(join([tag("dt", why), tag("dd", names_of(names))]) for why, names in reasons.items())
    return tag("div", head, tag("dl", entries, class_="left"))


def names_of(names: Sequence[str]) -> Html:
    codes = [tag("code", name) for name in names]
    if len(codes) <= FOLDED:
        return join(codes, ", ")
    stages_of = ", ".join(dict.fromkeys(place_name(name) for name in names))
    return tag("details", tag("summary", f"{len(codes)} layers: {stages_of}"), join(codes, ", "))
