"""docs/works-with.md: its table is what tiny instances do, and its links and tests exist."""

import ast
import re

import pytest
import works_with
from pipeline_rows import ROWS

PAGE = works_with.PAGE.read_text()
LINES = dict(zip(ROWS, works_with.lines_of(PAGE), strict=True))
# One row each: a picture, a list of prompts' embeddings, a video, flow matching, a refusal.
FEW = [("cogvideox", "minmax"), ("auraflow", "minmax"), ("inpaint9", "minmax")]
REFUSED = ["zimage", "cascade"]


def cells_of(name):
    return [each.strip() for each in LINES[name].split(" | ")]


@pytest.mark.parametrize(("name", "method"), FEW)
def test_a_row_that_says_yes(name, method):
    assert cells_of(name)[2 + works_with.METHODS.index(method)] == works_with.YES
    assert works_with.cell(name, method) == works_with.YES


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_that_says_no(name):
    text = works_with.cell(name, "best")
    assert cells_of(name)[2:5] == ["no", "no", "no"]
    assert f"{text}." in LINES[name]


def test_most_rows_say_yes():
    answers = [cells_of(name)[2:5] for name in ROWS]
    assert sum(each == ["yes", "yes", "yes"] for each in answers) >= 20


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)
    assert len(named) > 15
    for path, name in named:
        tree = ast.parse((works_with.ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_what_the_instances_do(name):
    assert works_with.line(name) == LINES[name]
