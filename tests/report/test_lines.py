"""The plot: its size, its colours, and a falling timestep axis."""

from pathlib import Path

import numpy as np
from PIL import Image

from lowtide.report.lines import lines
from lowtide.report.palette import ACCENT, INK


def place(picture: np.ndarray, colour: str) -> tuple[float, int]:
    """The middle row of a colour's pixels, and how many there are."""
    rows = np.nonzero((picture == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(2))[0]
    return float(np.median(rows)), len(rows)


def test_plot(tmp_path: Path) -> None:
    steps = list(range(900, -1, -100))
    path = lines(
        tmp_path / "new" / "plot.png",
        {"minmax": [0.9] * 10, "tfmq": [0.1] * 10},
        steps,
        "t",
        "error",
        "Title",
    )
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (1000, 1800, 3)
    high, _ = place(picture[150:], INK)
    low, count = place(picture[150:], ACCENT)
    assert high < 200 < 500 < low and count > 1000
    assert [file.name for file in path.parent.iterdir()] == ["plot.png"]
