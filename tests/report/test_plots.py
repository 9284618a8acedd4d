"""Plots are right where they can be wrong: places, ticks, names, colours."""

import re
from itertools import combinations

import matplotlib
import numpy as np
import pytest

from lowtide.report import evidence
from lowtide.report.page import parts, plots
from lowtide.report.palette import DASHES, RAMPS


def texts(svg: str) -> dict[str, tuple[float, float, str]]:
    """Text -> (x, y, anchor) of each word of a plot for a wide page."""
    wide = svg.partition("</svg>")[0]
    words = re.findall(r"<text ([^>]+)>([^<]*)</text>", wide)
    return {text: (*map(float, re.findall(r' [xy]="([^"]+)"', tag)), tag) for tag, text in words}


def lines_plot(
    values: list[list[float]], *, log: bool = False
) -> dict[str, tuple[float, float, str]]:
    steps = tuple(range(980, -1, -20))
    curves = [
        plots.Line(f"line {number}", 1 + number, np.array(line * len(steps))[: len(steps)])
        for number, line in enumerate(values)
    ]
    return texts(plots.plot("", lambda width: plots.lines(width, curves, steps, "error", log=log)))


def test_axes_place_and_tick() -> None:
    """Timesteps fall from left to right; a logarithmic axis has a tick for each decade."""
    words = lines_plot([[0.001, 10.0]], log=True)
    places = [words[str(step)][0] for step in (800, 600, 400, 200, 0)]
    assert np.diff(places) == pytest.approx([places[1] - places[0]] * 4, rel=1e-3) and places[0] > 0
    levels = [words[text][1] for text in ("0.001", "0.01", "0.1", "1", "10")]
    assert np.diff(levels) == pytest.approx([levels[1] - levels[0]] * 4, rel=1e-3)
    assert levels[0] > levels[-1]


@pytest.mark.parametrize("width", [340, 850])
def test_the_legend_has_each_name_once_and_in_its_colour(width: float) -> None:
    """A name of 40 characters stays within the figure, and no line runs below the names."""
    names = [f"{letter} W4A8, twice reconstructed and rounded" for letter in "abcdef"]
    curves = [plots.Line(name, 1 + place, np.ones(3)) for place, name in enumerate(names)]
    with matplotlib.rc_context({"figure.dpi": 72, "font.size": 12.5}):
        figure = plots.lines(width, curves, (2, 1, 0), "error", log=False)
        figure.draw_without_rendering()
    legend = figure.legends[0]
    words = legend.get_texts()
    assert [word.get_text().replace("\n", " ") for word in words] == names
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert [word.get_color() for word in words] == colours and len(set(colours)) == 6
    boxes = [word.get_window_extent() for word in words]
    assert max(box.x1 for box in boxes) <= width and max(box.y1 for box in boxes) <= figure.bbox.y1
    assert not any(box.overlaps(other) for box, other in combinations(boxes, 2))
    assert min(box.y0 for box in boxes) > figure.axes[0].bbox.y1
    assert figure.axes[0].bbox.height > 200


@pytest.mark.parametrize("colour", range(1, 1 + evidence.COLOURS))
def test_a_swatch_has_the_dashes_of_the_line(colour: int) -> None:
    lines = [plots.Line("model", colour, np.ones(3))]
    svg = plots.plot("", lambda width: plots.lines(width, lines, (2, 1, 0), "error", log=False))
    drawn = re.search(r"stroke-dasharray: ([\d.,]+)", svg)
    lengths = [float(length) for length in drawn[1].split(",")] if drawn else []
    ends = re.findall(r" ([\d.]+)px[,)]", parts.swatch(DASHES[colour - 1]))
    assert np.diff([0.0, *map(float, ends)]) == pytest.approx(lengths)
    assert bool(drawn) == bool(DASHES[colour - 1])


def test_heat_map_leaves_out_what_is_no_number() -> None:
    error = np.full((5, 3), 0.01)
    error[3, 1] = 0.5
    error[0, 2] = np.nan
    table = evidence.ErrorTable(tuple("abcde"), (900, 500, 100), error)
    image = plots.heat_maps(850, {"model": table}, "error").axes[0].images[0]
    pixels = image.to_rgba(image.get_array(), bytes=True)
    assert pixels.shape == (3, 5, 4)
    assert np.argwhere(pixels[..., 3] == 0).tolist() == [[2, 0]]
    darkest = np.where(pixels[..., 3] == 255, luma(pixels), 255).argmin()
    assert np.unravel_index(darkest, (3, 5)) == (1, 3)


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., :3] @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("paper", RAMPS)
def test_a_ramp_reads_without_colour(paper: str) -> None:
    """It goes one way, from almost white to almost black on light paper, and back on dark paper."""
    columns = parts.channels(RAMPS[paper]).values()
    greys = plots.ERROR_COLOURS(np.linspace(0, 1, 256))[:, 0]
    places = np.linspace(0, 1, len(RAMPS[paper]))
    colours = [np.interp(greys, places, list(map(float, column.split()))) for column in columns]
    levels = luma(255 * np.stack(colours, -1))
    ends = levels if paper == "light" else levels[::-1]
    assert np.diff(ends).max() <= 0 and ends[0] > 230 and ends[-1] < 40


def test_equal_models_share_no_id() -> None:
    table = evidence.ErrorTable(("a", "b"), (1, 0), np.ones((2, 2)))
    tables = {"one": table, "other": table}
    svg = plots.plot("", lambda width: plots.heat_maps(width, tables, "error"))
    ids = re.findall(r' id="([^"]+)"', svg)
    used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    assert len(ids) == len(set(ids)) and set(used) <= set(ids) and used
