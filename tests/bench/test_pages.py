"""The pages say what the finished cells say: drawing them again changes nothing."""

import pages
import pytest

from lowtide.errors import BadInput

SHARED = {"seed": 0, "trajectory_error": 0.2, "bytes": 1000, "minutes": 1.0, "code": "c0de"}
CELLS = [
    SHARED | {"method": "tfmq", "width": "W4A8", "psnr": 30.0, "step_error": 0.03},
    SHARED | {"method": "tfmq", "width": "W4A8", "psnr": 32.0, "step_error": 0.03, "seed": 1},
    SHARED | {"method": "tfmq -fsc", "width": "W4A8", "psnr": 29.0, "step_error": 0.04},
    SHARED | {"method": "best", "width": "W4A8", "psnr": 33.0, "step_error": 0.02},
    SHARED | {"method": "minmax", "width": "W4A8", "psnr": 35.0, "step_error": 0.02},
    SHARED | {"method": "tfmq", "width": "W4A4", "psnr": 12.0, "step_error": 0.3},
]
PAGES = pages.drawn()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_what_is_committed_is_what_the_cells_say(path):
    assert path.read_text() == PAGES[path], "run `python bench/pages.py`"


@pytest.mark.parametrize("path", sorted(pages.PAGES.glob("*.md")), ids=lambda path: path.stem)
def test_every_method_has_a_measured_table(path):
    assert path.stem == "README" or pages.MARKED.search(path.read_text())


def test_a_table_between_its_marks():
    mark = "<!-- measured: zoo:x | W4A8, W4A4 | tfmq, tfmq -fsc | psnr, bytes -->"
    before = f"Above.\n\n{mark}\nolder\n<!-- end -->\n\nBelow.\n"
    rows = [
        "|  | seeds | W4A8: PSNR to float, dB | bytes on disk "
        "| W4A4: PSNR to float, dB | bytes on disk |",
        "| --- | --- | --- | --- | --- | --- |",
        "| tfmq | 1, 2 | 31.00 ± 1.41 | 1,000 | 12.00 | 1,000 |",
        "| tfmq without FSC | 1 | 29.00 | 1,000 |  |  |",
    ]
    after = pages.filled(before, {"zoo:x": CELLS})
    assert after == before.replace("older", "\n".join(rows))
    assert pages.filled(after, {"zoo:x": CELLS}) == after


def test_best_against_the_nearest_paper():
    lines = pages.against([cell for cell in CELLS if cell["width"] == "W4A8"])
    assert lines[2] == "| W4A8 | 33.00 | 0.0200 | tfmq | 31.00 ± 1.41 | 0.0300 ± 0.0000 |"


@pytest.mark.parametrize("contents", ["zoo:y | W4A8 | tfmq", "zoo:x | W4A8 | tfmq -tiar"])
def test_a_table_of_what_was_never_run_is_an_error(contents):
    with pytest.raises(BadInput, match="found"):
        pages.filled(f"<!-- measured: {contents} -->\n<!-- end -->", {"zoo:x": CELLS})
