"""Three cells of the quality bench, drawn anew: the stored tables are of the code that is here.

Stored cells are in bench/results/quality. These here are measured on fewer images. A step error is
a mean over many values: it depends far less on which images they are than on the method.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from lowtide.workflows import method_table

STORED = Path(__file__).parents[2] / "bench/results/quality/zoo-digits.jsonl"
MODEL = "zoo:digits"
# Ranges of one and of all steps, and a rounding that is learnt for the temporal block alone.
CELLS = [("minmax", "W4A8"), ("ptq4dm", "W8A8"), ("tfmq-reconstruct", "W4A8")]
IMAGES = 8
SHARE = 0.05  # of the stored mean


def stored(cell: method_table.MethodCell) -> list[dict]:
    """The stored lines of a method at a width, of all seeds."""
    lines = [json.loads(line) for line in STORED.read_text().splitlines()]
    found = [each for each in lines if (each["method"], each["width"]) == (cell.title, cell.width)]
    assert found, f"no stored cell of {cell.title} at {cell.width}"
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    out = tmp_path_factory.mktemp("cells")
    cells = [each for method, width in CELLS for each in method_table.grid(method, width, [0])]
    newest = stored(cells[0])[-1]
    lines = method_table.quality(MODEL, out, cells, newest["options"], IMAGES)
    return dict(zip(CELLS, zip(cells, lines, strict=True), strict=True))


@pytest.mark.parametrize("name", CELLS, ids="-".join)
def test_a_cell_is_within_the_band_of_the_stored_ones(drawn, name):
    cell, line = drawn[name]
    known = np.mean([each["step_error"] for each in stored(cell)])
    assert line["step_error"] == pytest.approx(known, rel=SHARE)
