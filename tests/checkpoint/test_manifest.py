"""The list of files: what lowtide wrote, and whether it is still as it was written."""

import json

import pytest

from lowtide.checkpoint import folders
from lowtide.checkpoint.manifest import MANIFEST, altered, listed


@pytest.fixture
def place(tmp_path):
    with folders.written_beside(tmp_path / "x") as fresh:
        (fresh / "model_index.json").write_text("{}")
        (fresh / "scheduler").mkdir()
        (fresh / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 1}')
        (fresh / "weights.safetensors").write_bytes(b"hashed by tensors")
    return tmp_path / "x"


def test_a_folder_as_it_was_written(place):
    assert altered(place) == []
    assert listed(place) == {
        MANIFEST,
        "model_index.json",
        "scheduler/scheduler_config.json",
        "weights.safetensors",
    }


def test_an_altered_and_a_missing_file_are_named(place):
    config = place / "scheduler" / "scheduler_config.json"
    config.write_text('{"beta_start": 2}')
    (place / "model_index.json").unlink()
    assert altered(place) == ["model_index.json", "scheduler/scheduler_config.json"]


def test_a_file_that_is_added_leaves_the_hashes_of_the_others(place):
    (place / "model_index.json").write_text("{ }")
    with folders.written_file(place / "plot.png") as fresh:
        fresh.write_bytes(b"plot")
    assert altered(place) == ["model_index.json"]
    assert "plot.png" in listed(place)
    (place / "plot.png").write_bytes(b"other")
    assert altered(place) == ["model_index.json", "plot.png"]


def test_a_list_of_the_first_version_has_no_hashes(place):
    names = sorted(listed(place) - {MANIFEST})
    (place / MANIFEST).write_text(json.dumps({"version": 1, "files": names}))
    (place / "model_index.json").write_text("{ }")
    assert altered(place) == []
    assert listed(place) == {MANIFEST, *names}


@pytest.mark.parametrize("text", ["", "[]", '{"files": 3}', '{"files"', "\xff"])
def test_a_folder_without_a_readable_list_is_nobodys(place, text):
    (place / MANIFEST).write_text(text)
    assert listed(place) == frozenset()
    assert altered(place) == []
