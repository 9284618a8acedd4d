"""What the pages claim stands in the tables that commands wrote."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SPREAD = re.compile(r"\d+\.\d+\s±\s\d+\.\d+")


@pytest.mark.parametrize(
    "page", sorted((DOCS / "methods").glob("*.md")), ids=lambda page: page.stem
)
def test_every_spread_in_a_methods_page_is_one_of_the_results(page):
    results = set(SPREAD.findall((DOCS / "results.md").read_text()))
    assert len(results) > 50
    claimed = {re.sub(r"\s", " ", found) for found in SPREAD.findall(page.read_text())}
    assert claimed <= results


def test_every_number_in_the_table_of_the_readme_is_measured():
    rows = [
        line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `zoo:")
    ]
    assert len(rows) == 3
    measured = set(re.findall(r"\d+\.\d+", (DOCS / "measured.md").read_text()))
    assert set(re.findall(r"\d+\.\d+", "".join(rows))) <= measured


def test_every_test_that_the_audit_names_exists():
    named = re.findall(r"`(tests/\S+\.py)::(\w+)`", (DOCS / "audit.md").read_text())
    assert len(named) > 20
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / file).read_text(), f"{file}::{name}"
