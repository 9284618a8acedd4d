"""All metrics in one table, and the models as points between size and likeness."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lowtide.report.page.evidence import Evidence, Measure, Model
from lowtide.report.page.markup import (
    NOTHING,
    Html,
    brief,
    counted,
    figures,
    join,
    size,
    tag,
    unseen,
)
from lowtide.report.page.plot import FIELD, Axis, down, frame, percentage, scale, swatch

NAMES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "latent_mse": "Latent MSE",
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "is": "Inception score",
    "precision": "Precision",
    "recall": "Recall",
    "clip": "CLIP score",
    "fd-efficientnet": "FD (EfficientNet)",
}
HEIGHT = 360
ROOMS = {"roomy": (770, 240), "tight": (270, 130)}
MOST_DECIMALS = 7
LETTER, TALL, GAP, MARGIN = 6.9, 18, 10, 40


def table(evidence: Evidence) -> Html | None:
    names = list(dict.fromkeys(name for model in evidence.models for name in model.metrics))
    if not names:
        return None
    heads = (tag("th", swatch(evidence.number(model)), model.name, scope="col") for model in evidence.models)
    body = (row(evidence, name, note) for note, name in enumerate(names, 1))
    grid = tag(
        "table",
        tag("caption", unseen("Metrics by model")),
        tag("thead", tag("tr", tag("th", "Metric", scope="col"), join(heads))),
        tag("tbody", join(body)),
        class_="metrics",
    )
    notes = tag("ol", join(tag("li", footnote(evidence, name)) for name in names), class_="footnotes")
    return join([tag("div", grid, class_="scrolls", tabindex="0", role="region", aria_label="Metrics"), notes])


def row(evidence: Evidence, name: str, note: int) -> Html:
    measures = {model.key: model.metrics[name] for model in evidence.models if name in model.metrics}
    higher = next(iter(measures.values())).higher_is_better
    best = best_value([measures[model.key] for model in evidence.others if model.key in measures])
    arrow = tag("span", "↑" if higher else "↓", class_="arrow", title="higher is better" if higher else "lower is better")
    told = unseen("higher is better" if higher else "lower is better")
    label = title(name)
    head = tag("th", label, " ", arrow, told, tag("sup", str(note)), scope="row", title=footnote(evidence, name))
    digits = decimals([measure.value for measure in measures.values()])
    cells = (cell(measures.get(model.key), None if model is evidence.reference else best, digits) for model in evidence.models)
    return tag("tr", head, join(cells))


def title(name: str) -> str:
    return NAMES.get(name, name)


def best_value(measures: Sequence[Measure]) -> float | None:
    """The best of what was quantized; one alone is not the best of anything."""
    good = [each for each in measures if not math.isnan(each.value)]
    if len(good) < 2:
        return None
    values = [each.value for each in good]
    return max(values) if good[0].higher_is_better else min(values)


def cell(measure: Measure | None, best: float | None, digits: int) -> Html:
    if measure is None:
        return tag("td", NOTHING)
    value = written(measure.value, digits)
    strong = measure.value == best
    interval = None
    if measure.low is not None and measure.high is not None:
        interval = tag("span", f"{written(measure.low, digits)} to {written(measure.high, digits)}", class_="interval")
    return tag("td", tag("strong", value, unseen(", the best")) if strong else tag("span", value), interval)


def decimals(values: Sequence[float]) -> int:
    """As many for a whole row as give its smallest value three figures: 2 for PSNR, 4 for SSIM."""
    known = [abs(value) for value in values if math.isfinite(value) and value] or [1.0]
    return 2 if min(known) >= 1 else max(4, 2 - math.floor(math.log10(min(known))))


def written(value: float, digits: int) -> str:
    return figures(value) if digits > MOST_DECIMALS or not math.isfinite(value) else f"{value:,.{digits}f}"


def footnote(evidence: Evidence, name: str) -> str:
    """How it was measured: of the first model that has it, for all are measured alike."""
    measure = next(model.metrics[name] for model in evidence.models if name in model.metrics)
    count = [counted(measure.n, "image")] if measure.n else []
    told = [f"{key.replace('_', ' ')} {value}" for key, value in measure.about.items() if isinstance(value, str | int | float)]
    return f"{title(name)}: {', '.join([*told, *count]) or 'nothing more was recorded'}."


@dataclass(frozen=True)
class Box:
    """A piece of the plot in pixels, taken by a point or a label."""

    left: float
    top: float
    width: float
    height: float

    def hits(self, other: "Box") -> bool:
        across = self.left < other.left + other.width and other.left < self.left + self.width
        return across and self.top < other.top + other.height and other.top < self.top + self.height

    def outside(self, width: float) -> float:
        """How far it sticks out of a field that wide; the margin with the ticks may be used."""
        across = max(0, -self.left - MARGIN, self.left + self.width - width)
        return across + max(0, -self.top, self.top + self.height - HEIGHT)


def pareto(evidence: Evidence) -> Html | None:
    """Size against PSNR. The original has no PSNR to itself: a line stands at its size."""
    points = [model for model in evidence.others if "psnr" in model.metrics and math.isfinite(model.metrics["psnr"].value)]
    if not points:
        return None
    sizes = [evidence.reference.bytes, *(model.bytes for model in points)]
    marks = [mark for model in points for mark in (model.metrics["psnr"].low, model.metrics["psnr"].high) if mark is not None]
    x = Axis("size on disk", scale(sizes, log=max(sizes) > 4 * min(sizes), room=0.1), lambda count: brief(size(count)))
    y = Axis(
        "PSNR, dB",
        scale([*marks, *(model.metrics["psnr"].value for model in points)], room=0.12),
        lambda db: brief(figures(db, 4)),
    )
    body = join([front(points, x, y), original(evidence.reference, x), *(whisker(evidence, model, x, y) for model in points)])
    over = join(
        [*(dot(evidence, model, x, y) for model in points), *labels(evidence, points, x, y), beside(evidence.reference, x)]
    )
    label = "Size and PSNR: " + "; ".join(
        f"{model.name} {size(model.bytes)}, {model.metrics['psnr'].value:.2f} dB" for model in points
    )
    return tag("figure", frame(x, y, body, over, height=HEIGHT, label=label), class_="plot pareto")


def original(reference: Model, x: Axis) -> Html:
    return tag("path", d=f"M{FIELD * x.scale.place(reference.bytes):.1f} 0V{FIELD}", class_="line s0")


def beside(reference: Model, x: Axis) -> Html:
    at = x.scale.place(reference.bytes)
    side = f"right:calc({percentage(1 - at)} + 6px)" if at > 0.5 else f"left:calc({percentage(at)} + 6px)"
    return tag("span", reference.name, class_="label original s0", style=f"{side};top:0")


def front(points: Sequence[Model], x: Axis, y: Axis) -> Html:
    """The land below the stairs through the models that no other beats in both."""
    best, path = -math.inf, []
    for model in sorted(points, key=lambda model: (model.bytes, -model.metrics["psnr"].value)):
        psnr = model.metrics["psnr"].value
        if psnr > best:
            at, height = FIELD * x.scale.place(model.bytes), down(y, psnr)
            path.append(f"H{at:.1f}V{height:.1f}" if path else f"M{at:.1f} {FIELD}V{height:.1f}")
            best = psnr
    return tag("path", d="".join(path) + f"H{FIELD}V{FIELD}Z", class_="front")


def whisker(evidence: Evidence, model: Model, x: Axis, y: Axis) -> Html | None:
    psnr = model.metrics["psnr"]
    if psnr.low is None or psnr.high is None:
        return None
    at = FIELD * x.scale.place(model.bytes)
    return tag(
        "path", d=f"M{at:.1f} {down(y, psnr.low):.1f}V{down(y, psnr.high):.1f}", class_=f"whisker s{evidence.number(model)}"
    )


def dot(evidence: Evidence, model: Model, x: Axis, y: Axis) -> Html:
    place = f"left:{percentage(x.scale.place(model.bytes))};top:{percentage(1 - y.scale.place(model.metrics['psnr'].value))}"
    return tag("span", class_=f"dot s{evidence.number(model)}", style=place)


def labels(evidence: Evidence, points: Sequence[Model], x: Axis, y: Axis) -> list[Html]:
    """The names twice, placed for a wide page and for a phone; the style sheet shows one of the two."""
    places = [(x.scale.place(model.bytes), 1 - y.scale.place(model.metrics["psnr"].value)) for model in points]
    found = []
    for room, (width, most) in ROOMS.items():
        sides = sides_of([model.name for model in points], places, width, most)
        for model, (left, top), side in zip(points, places, sides, strict=True):
            style, kind = f"left:{percentage(left)};top:{percentage(top)}", f"label {room} {side} s{evidence.number(model)}"
            found.append(tag("span", model.name, class_=kind, style=style, title=model.name))
    return found


def sides_of(names: Sequence[str], places: Sequence[tuple[float, float]], width: float, most: float) -> list[str]:
    """For each name that side of its point where it hits nothing that stands there already and stays inside."""
    taken = [Box(left * width - 5, top * HEIGHT - 5, 10, 10) for left, top in places]
    chosen = []
    for name, (left, top) in zip(names, places, strict=True):
        boxes = around(left * width, top * HEIGHT, min(most, LETTER * len(name)))
        costs = {side: sum(map(box.hits, taken)) * 1000 + 100 * box.outside(width) for side, box in boxes.items()}
        chosen.append(min(costs, key=costs.__getitem__))
        taken.append(boxes[chosen[-1]])
    return chosen


def around(left: float, top: float, width: float) -> dict[str, Box]:
    """The eight places for a name, the near ones first, by the classes that put it there."""
    above, below = top - TALL - 1, top + 1
    heights = {"above": above, "below": below, "far above": above - TALL, "far below": below + TALL}
    sides = {"right": left + GAP, "left": left - GAP - width}
    return {f"{height} {side}": Box(sides[side], heights[height], width, TALL) for height in heights for side in sides}
