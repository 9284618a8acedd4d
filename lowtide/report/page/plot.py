"""Plots without a chart library: lines stretch with the page, text does not, so that a phone shows both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lowtide.report.page.markup import Html, figures, join, script, tag, unseen

FIELD = 1000
MOST_TICKS = 7
LABEL = 17


@dataclass(frozen=True)
class Scale:
    """Where a value stands between 0 and 1; `log` for what spans decades. A low above high runs backwards."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        if self.log:
            value = min(max(value, self.low), self.high)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        return self.decades() if self.log else self.rounds()

    def rounds(self) -> list[float]:
        low, high = sorted((self.low, self.high))
        step = pleasant((high - low) / (MOST_TICKS - 2))
        first = math.ceil(low / step - 1e-9)
        count = math.floor(high / step + 1e-9) - first + 1
        return [(first + number) * step for number in range(count)]

    def decades(self) -> list[float]:
        """1, 10, 100; with 2 and 5 between them where decades alone are too few."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for parts in ((1,), (1, 3), (1, 2, 5)):
            found = [part * 10.0**power for power in powers for part in parts]
            inside = [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
            if len(inside) >= 3:
                break
        # Values that lie closer together than 2 and 5 do.
        if not inside:
            return Scale(self.low, self.high).rounds()
        return inside[:: math.ceil(len(inside) / MOST_TICKS)]


def pleasant(step: float) -> float:
    """The next of 1, 2, 5, 10, 20, ..."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(part * power for part in (1, 2, 5, 10) if part * power >= step * 0.999)


def scale(values: Sequence[float], *, log: bool = False, room: float = 0.06, zero: bool = False) -> Scale:
    """A scale that holds all finite values with some room around them."""
    good = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(good), max(good)
    if log:
        span = max(math.log(high / low), math.log(1.6)) * room
        return Scale(low * math.exp(-span), high * math.exp(span) * (1.6 if low == high else 1), True)
    low = min(low, 0.0) if zero else low
    span = (high - low) or abs(high) or 1.0
    return Scale(low if zero and low >= 0 else low - span * room, high + span * room)


@dataclass(frozen=True)
class Line:
    """A series: its colour's number, its name and its values, one for each x."""

    colour: int
    name: str
    values: Sequence[float]


@dataclass(frozen=True)
class Axis:
    """What an axis measures, its scale, and how its ticks are written."""

    title: str
    scale: Scale
    write: Callable[[float], str] = figures


def percentage(share: float) -> str:
    return f"{100 * share:.2f}%"


def frame(x: Axis, y: Axis, body: Html, over: Html, *, height: int, label: str) -> Html:
    """The plot's field: hairlines and drawing below, ticks and words above."""
    rules = [tag("path", d=f"M0 {down(y, value):.1f}H{FIELD}", class_="hair") for value in y.scale.ticks()]
    drawing = tag(
        "svg",
        join(rules),
        body,
        viewBox=f"0 0 {FIELD} {FIELD}",
        preserveAspectRatio="none",
        aria_hidden="true",
        focusable="false",
    )
    words = [
        *(tick("y", "top", 1 - y.scale.place(value), y.write(value)) for value in y.scale.ticks()),
        *(tick("x", "left", x.scale.place(value), x.write(value)) for value in x.scale.ticks()),
        tag("span", y.title, class_="axis y"),
        tag("span", x.title, class_="axis x"),
    ]
    return tag("div", unseen(label), drawing, join(words), over, class_="field", style=f"--tall:{height}px")


def tick(axis: str, side: str, share: float, text: str) -> Html:
    return tag("span", text, class_=f"tick {axis}", style=f"{side}:{percentage(share)}", aria_hidden="true")


def down(y: Axis, value: float) -> float:
    return FIELD * (1 - y.scale.place(value))


def points(xs: Sequence[float], line: Line, x: Axis, y: Axis) -> Html:
    """The line, broken where a value cannot be drawn."""
    path, pen = [], "M"
    for at, value in zip(xs, line.values, strict=True):
        drawn = math.isfinite(value) and (value > 0 or not y.scale.log)
        if drawn:
            path.append(f"{pen}{FIELD * x.scale.place(at):.1f} {down(y, value):.1f}")
        pen = "L" if drawn else "M"
    return tag("path", d="".join(path), class_=f"line s{line.colour}")


def lines(xs: Sequence[float], series: Sequence[Line], x: Axis, y: Axis, *, height: int = 340, label: str) -> Html:
    """Lines named where they end, with a cursor that reads out every line at one x."""
    ends = spread([1 - y.scale.place(last(line.values)) for line in series], LABEL / height)
    names = [
        tag("span", line.name, class_=f"end s{line.colour}", style=f"top:{percentage(at)}", aria_hidden="true", title=line.name)
        for line, at in zip(series, ends, strict=True)
    ]
    over = join([*names, tag("span", class_="cursor", hidden=True)])
    body = join(points(xs, line, x, y) for line in series)
    data = {
        "x": list(xs),
        "at": [x.scale.place(value) for value in xs],
        "name": x.title,
        "lines": [{"name": line.name, "colour": line.colour, "values": list(line.values)} for line in series],
    }
    return tag(
        "figure",
        key([(line.colour, line.name) for line in series]),
        frame(x, y, body, over, height=height, label=label),
        tag("p", class_="readout", aria_live="polite"),
        script(data),
        class_="plot",
        data_lines=True,
    )


def last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value) and value > 0), 1.0)


def spread(places: Sequence[float], least: float) -> list[float]:
    """The places, moved apart until no two are nearer than `least`, in their order, within 0 and 1 where they fit."""
    order = sorted(range(len(places)), key=lambda number: places[number])
    moved = list(places)
    for before, number in pairwise(order):
        moved[number] = max(moved[number], moved[before] + least)
    excess = max(0.0, moved[order[-1]] - 1) if order else 0.0
    limit = moved[order[-1]] - excess if order else 0.0
    for number in reversed(order):
        moved[number] = min(moved[number], limit)
        limit = moved[number] - least
    return moved


def key(entries: Sequence[tuple[int, str]]) -> Html:
    """Which colour and dash is which."""
    return tag("ul", join(tag("li", swatch(colour), name) for colour, name in entries), class_="key")


def swatch(colour: int) -> Html:
    return tag(
        "svg", tag("path", d="M0 5H22", class_=f"line s{colour}"), class_="swatch", viewBox="0 0 22 10", aria_hidden="true"
    )
