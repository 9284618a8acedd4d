"""Limits of memory and disk are kept to before the work, and what is full is one sentence."""

import shutil
from collections import namedtuple

import pytest
import tiny_pipelines
import torch

from lowtide import estimate
from lowtide.checkpoint.provenance import check_here
from lowtide.errors import BadInput
from lowtide.report import text
from lowtide.stages import tape
from lowtide.workflows.limits import Limits, check_limits, kept_bytes, result_bytes

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def predicted(tmp_path_factory):
    home = tmp_path_factory.mktemp("limits")
    tiny_pipelines.ddim(home).save_pretrained(home / "float")
    return estimate.plan(str(home / "float"), method="minmax", steps=2, images=1)


def test_what_is_within_the_limits_runs(predicted, tmp_path):
    whole = result_bytes(predicted) + kept_bytes(predicted)
    check_limits(predicted, tmp_path / "out", Limits())
    check_limits(predicted, tmp_path / "out", Limits(predicted.peak_bytes, whole))


def test_more_memory_or_disk_than_the_limit_is_refused(predicted, tmp_path):
    with pytest.raises(BadInput, match=r"predicted to take .* of memory; expected at most"):
        check_limits(predicted, tmp_path / "out", Limits(memory=predicted.peak_bytes - 1))
    whole = result_bytes(predicted) + kept_bytes(predicted)
    with pytest.raises(BadInput, match=r"predicted to take .* of disk: .*--max-disk"):
        check_limits(predicted, tmp_path / "out", Limits(disk=whole - 1))


def test_a_disk_without_room_for_the_result_is_named(predicted, tmp_path, monkeypatch):
    left = result_bytes(predicted) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, left))
    with pytest.raises(BadInput, match=f"left in {tmp_path} for a result of"):
        check_limits(predicted, tmp_path / "new" / "out", Limits())


def test_a_full_temporary_folder_is_one_sentence(monkeypatch):
    store = tape.Store(budget=0)
    record = tape.Tape(store)
    record.append(torch.ones(4))
    shutil.rmtree(store.folder.name)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 3))
    with pytest.raises(BadInput, match=r"found 3 bytes left in the temporary folder .*TMPDIR"):
        record.append(torch.ones(4))


def test_nothing_is_fetched_that_only_a_folder_names(tmp_path):
    check_here("zoo:digits", "packed", "--reference")
    check_here(str(tmp_path), "packed", "--reference")
    with pytest.raises(BadInput, match=r"made of some/model, .*give --reference some/model"):
        check_here("some/model", "packed", "--reference")


def lines_of(**more):
    return [*text._constant(more.get("constant", [])), *text._rolled_back(more.get("losses", {}))]


def test_the_last_line_says_how_many_were_rolled_back():
    losses = {"Reconstruct a": [1.0, 0.5], "Reconstruct b": [1.0, 1.0], "TIAR c": [0.1, 0.2]}
    expected = "2 of 3 parts that learnt were rolled back, being no better: Reconstruct b, TIAR c"
    assert lines_of(losses=losses)[-1] == expected
    assert lines_of(losses={"Reconstruct a": [1, 0.5]})[-1].startswith("0 of 1 part that learnt")
    assert lines_of() == []


def test_an_input_of_one_value_is_named():
    assert lines_of(constant=["conv_in"])[0].endswith("no width: conv_in")
