"""Heat maps of errors by layer and timestep: one pixel a cell, drawn twice, for light and for dark paper."""

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from PIL import Image

from lowtide.report.page.evidence import Drift
from lowtide.report.page.markup import Html, figures, join, script, tag, unseen
from lowtide.report.page.plot import Scale, percentage

# Each ramp falls or climbs in lightness alone, so it reads without colour; the far end of each is the worst error.
LIGHT = ("#f0f3f1", "#c3dbdc", "#7fb6c4", "#3b88a8", "#1c5683", "#1a2350")
DARK = ("#1b2228", "#1f4a66", "#2b7f94", "#67b193", "#c3cf85", "#f4e7b4")
ABSENT = {"light": "#ffffff", "dark": "#0f1316"}
DECADES = 5
LETTER, PADDING = 6.1, 4
WIDE, NARROW = 860, 280
MANY = 6


@dataclass(frozen=True)
class Span:
    """Consecutive layers of one stage of the network, as a share of the axis."""

    name: str
    start: float
    width: float


def colours(stops: Sequence[str]) -> np.ndarray:
    """256 colours along the stops, mixed in linear light."""
    known = np.array([[int(stop[place : place + 2], 16) for place in (1, 3, 5)] for stop in stops]) / 255
    at, where = np.linspace(0, 1, 256), np.linspace(0, 1, len(stops))
    mixed = np.stack([np.interp(at, where, known[:, channel] ** 2.2) for channel in range(3)], 1)
    return (255 * mixed ** (1 / 2.2)).round().astype(np.uint8)


def shared(tables: Sequence[Drift]) -> Scale:
    """One scale for all models, at most five decades deep, so that a colour means the same everywhere."""
    values = np.concatenate([table.error[np.isfinite(table.error) & (table.error > 0)] for table in tables])
    if not values.size:
        return Scale(0.1, 1.0, log=True)
    high = float(values.max())
    low = max(float(values.min()), high * 10.0**-DECADES)
    return Scale(low if low < high * 0.99 else high / 10, high, log=True)


def picture(table: Drift, scale: Scale, theme: str) -> Image.Image:
    """Names from left to right, timesteps from top to bottom; what is not a number has the colour of the paper."""
    error = table.error.T
    known = np.isfinite(error)
    clipped = np.clip(np.where(known, error, scale.low), scale.low, scale.high)
    share = np.log(clipped / scale.low) / math.log(scale.high / scale.low)
    drawn = colours(LIGHT if theme == "light" else DARK)[(share * 255).round().astype(int)]
    drawn[~known] = [int(ABSENT[theme][place : place + 2], 16) for place in (1, 3, 5)]
    return Image.fromarray(drawn)


def inline(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def place_name(unit: str) -> str:
    """Where in the network a unit is: down 1, mid, up 0, time, block 12."""
    if unit.startswith("temporal:"):
        return "time"
    found = re.match(r"([A-Za-z_]+?)(?:_?blocks?|s)?(?:\.(\d+))?(?:\.|$)", unit)
    if not found:
        return unit.split(".")[0]
    stem = found[1].replace("conv_", "").replace("_", " ")
    return f"{stem} {found[2]}" if found[2] else stem


def spans(units: Sequence[str], widths: Sequence[float]) -> list[Span]:
    """Neighbours of one stage together; `widths` are shares of the axis."""
    found, at = [], 0.0
    for name, group in groupby(zip(units, widths, strict=True), key=lambda pair: place_name(pair[0])):
        width = sum(width for _, width in group)
        found.append(Span(name, at, width))
        at += width
    return found


def stages(found: Sequence[Span]) -> Html:
    """The stages' names below the axis: those with room on a wide page, and those with room on a phone too."""
    stems = Counter(span.name.rpartition(" ")[0] for span in found)
    drawn = (stage(span, numbered=stems[span.name.rpartition(" ")[0]] >= MANY) for span in found)
    return tag("div", join(drawn), class_="stages", aria_hidden="true")


def stage(span: Span, *, numbered: bool) -> Html:
    """One of many alike may go by its number alone."""
    words = [span.name, span.name.split()[-1]] if numbered else [span.name]
    text = next((word for word in words if fits(word, span.width * WIDE)), "")
    place = f"left:{percentage(span.start)};width:{percentage(span.width)}"
    room = "place" if fits(text, span.width * NARROW) else "place wide"
    return tag("span", tag("span", text), class_=room, style=place, title=span.name)


def fits(word: str, pixels: float) -> bool:
    return LETTER * len(word) + PADDING <= pixels


def heat_maps(named: Sequence[tuple[str, Drift]], group: str, what: str, *, rows: str) -> Html:
    """A map for each model behind a picker, the legend of their shared scale, and a cursor that reads out cells."""
    scale = shared([table for _, table in named])
    panels = [panel(name, table, scale, what) for name, table in named]
    return tag(
        "figure",
        picker([name for name, _ in named], group),
        join(panels),
        tag(
            "p",
            tag("span", "Point at a cell, or focus the map and use the arrow keys.", class_="hint"),
            class_="readout",
            aria_live="polite",
        ),
        legend(scale, what),
        class_="heat",
        data_panels=group,
        data_rows=rows,
    )


def picker(names: Sequence[str], group: str, label: str = "Model") -> Html:
    """A row of radio buttons; without a script all panels show and the picker hides."""
    buttons = [
        tag("label", tag("input", type="radio", name=group, value=place, checked=place == 0), tag("span", name))
        for place, name in enumerate(names)
    ]
    return tag("fieldset", tag("legend", label, class_="unseen"), join(buttons), class_="picker", hidden=len(names) < 2)


def panel(name: str, table: Drift, scale: Scale, what: str) -> Html:
    worst = np.unravel_index(np.nanargmax(table.error), table.error.shape) if np.isfinite(table.error).any() else (0, 0)
    label = (
        f"{what} of {name}: {len(table.names)} columns, {len(table.timesteps)} timesteps; "
        f"largest {figures(float(table.error[worst]))} at {table.names[worst[0]]}, timestep {table.timesteps[worst[1]]}."
    )
    images = [
        tag("img", src=inline(picture(table, scale, theme)), alt="", class_=f"only-{theme}", draggable="false")
        for theme in ("light", "dark")
    ]
    cells = tag(
        "div", join(images), tag("span", class_="cell", hidden=True), class_="cells", tabindex="0", role="group", aria_label=label
    )
    width = [1 / len(table.names)] * len(table.names)
    data = {"name": name, "names": table.names, "timesteps": table.timesteps, "error": table.error.tolist()}
    return tag(
        "div",
        tag("p", name, class_="panel-name"),
        tag("div", steps(table.timesteps), cells, class_="map", style=f"--tall:{tall(len(table.timesteps))}px"),
        stages(spans(table.units, width)),
        script(data),
        class_="panel",
    )


def tall(rows: int) -> int:
    return min(400, max(140, rows * (24 if rows <= 12 else 7)))


def steps(timesteps: Sequence[int]) -> Html:
    """The timesteps beside the map, as many as can be read."""
    height = tall(len(timesteps))
    every = math.ceil(len(timesteps) * 18 / height)
    return tag(
        "div",
        join(
            tag("span", str(t), class_="tick y", style=f"top:{percentage((place + 0.5) / len(timesteps))}")
            for place, t in enumerate(timesteps)
            if place % every == 0
        ),
        unseen("timesteps from noise, at the top, to image"),
        class_="steps",
        aria_hidden="true",
    )


def legend(scale: Scale, what: str) -> Html:
    ticks = [
        tag("span", figures(value, 1), class_="tick x", style=f"left:{percentage(scale.place(value))}") for value in scale.ticks()
    ]
    ramps = [tag("span", class_=f"ramp only-{theme}", style=f"background:{gradient(theme)}") for theme in ("light", "dark")]
    return tag(
        "div",
        tag("span", f"{what}, log scale", class_="legend-name"),
        tag("div", join(ramps), join(ticks), class_="bar"),
        class_="legend",
    )


def gradient(theme: str) -> str:
    found = colours(LIGHT if theme == "light" else DARK)[::17]
    return f"linear-gradient(90deg,{','.join('#' + bytes(colour).hex() for colour in found)})"
