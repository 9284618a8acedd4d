"""Plots are right where they can be wrong: places, ticks, names that keep apart, colours."""

import re

import numpy as np
import pytest

from lowtide.report import evidence, palette
from lowtide.report.page import plots


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


def test_names_at_line_ends_keep_apart() -> None:
    words = lines_plot([[0.5], [0.51], [0.98], [0.99], [0.1]])
    order = ["line 3", "line 2", "line 1", "line 0", "line 4"]
    levels = [words[name][1] for name in order]
    assert np.diff(levels).min() >= plots.NAME_HEIGHT - 1e-6
    level = words["0"][1] + 0.1 / 0.2 * (words["0.2"][1] - words["0"][1])
    assert levels[-1] == pytest.approx(level, abs=2)


def test_heat_map_puts_the_worst_cell_where_it_is() -> None:
    """The worst cell is the darkest on light paper, and the lightest on dark paper."""
    error = np.full((5, 3), 0.01)
    error[3, 1], error[0, 2] = 0.5, np.nan
    table = evidence.ErrorTable(tuple("abcde"), (900, 500, 100), error)
    norm = plots.shared_norm([table])
    light = plots.heat_pixels(table.error.T, norm, "light")
    dark = plots.heat_pixels(table.error.T, norm, "dark")
    assert light.shape == dark.shape == (3, 5, 4)
    known = light[..., 3] == 255
    assert np.argwhere(~known).tolist() == [[2, 0]] and light[2, 0, 3] == dark[2, 0, 3] == 0
    darkest = np.where(known, luma(light), 255).argmin()
    lightest = np.where(known, luma(dark), 0).argmax()
    assert np.unravel_index(darkest, (3, 5)) == np.unravel_index(lightest, (3, 5)) == (1, 3)


def luma(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., :3] @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("theme", palette.RAMPS)
def test_ramps_read_without_colour(theme: str) -> None:
    table = evidence.ErrorTable(("a",), (0,), np.array([[0.001, 1.0]]))
    pixels = plots.heat_pixels(np.geomspace(0.001, 1, 256)[None], plots.shared_norm([table]), theme)
    steps = np.diff(luma(pixels)[0])
    assert (steps * np.sign(steps.sum())).min() > -1 and abs(steps.sum()) > 150
