"""evidence.json is written as it was measured and read as it was written, by the same types."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from report.evidence import make, rewrite

from lowtide.report.evidence import ErrorTable, Evidence, as_json, read, write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path)


def test_what_is_read_is_written_again(folder: Path, tmp_path: Path) -> None:
    """Every key and value, but those that no type names."""
    data = json.loads((folder / "evidence.json").read_text())
    for model in data["models"].values():
        model.pop("peak_bytes", None)
        model.setdefault("per_image", {})
    data["run"] = None  # older files have none
    write(read(folder), tmp_path)
    assert json.loads((tmp_path / "evidence.json").read_text()) == data


def test_plain_json_has_no_nan(folder: Path) -> None:
    """NaN and infinity are null in the file, and NaN where it is read."""
    data = json.loads((folder / "evidence.json").read_text())
    data["models"]["tfmq"]["metrics"]["psnr"]["value"] = math.inf
    data["models"]["tfmq"]["layers"]["error"][0][0] = math.nan
    data["gates"][0]["value"] = math.nan
    evidence = read(rewrite(folder, data))
    assert evidence.models["tfmq"].psnr == math.inf
    tree = as_json(evidence)
    assert tree["models"]["tfmq"]["metrics"]["psnr"]["value"] is None
    assert tree["models"]["tfmq"]["layers"]["error"][0][0] is None
    assert tree["gates"][0]["value"] is None
    again = read(rewrite(folder, tree))
    assert math.isnan(again.models["tfmq"].psnr) and math.isnan(again.gates[0].value)
    layers = again.models["tfmq"].layers
    assert layers and math.isnan(layers.error[0][0]) and layers.error[1] == layers.error[1]


def test_absent_and_null_are_kept_apart_where_they_differ(folder: Path) -> None:
    """The reference has no `temporal`; of a model without temporal features it is null."""
    data = json.loads((folder / "evidence.json").read_text())
    tree = as_json(read(folder))
    assert "temporal" not in tree["models"]["float"] and "stages" not in tree["models"]["quanto"]
    assert tree["models"]["float"]["metrics"] == tree["models"]["float"]["per_image"] == {}
    assert tree["captions"] == data["captions"] and tree["request"]["eta"] is None


def test_the_lead_has_the_highest_psnr_of_lowtides_models(folder: Path) -> None:
    evidence = read(folder)
    assert evidence.lead == "tfmq" and evidence.base.kind == "float"
    assert [evidence.colour(key) for key in evidence.models] == [0, 1, 2, 3]
    data = json.loads((folder / "evidence.json").read_text())
    for model in data["models"].values():
        model["kind"] = "float"
    assert read(rewrite(folder, data)).lead == "quanto"
    data["models"]["quanto"]["metrics"]["psnr"]["value"] = None
    assert read(rewrite(folder, data)).lead == "tfmq"
    assert isinstance(evidence, Evidence)


def test_averages_and_largest_errors_leave_out_what_is_no_number() -> None:
    error = np.array([[1.0, np.nan, 3.0], [3.0, np.nan, 9.0], [np.nan, np.nan, np.nan]])
    table = ErrorTable(["a", "b", "c"], [2, 1, 0], error)
    assert np.array_equal(table.average(), [2.0, np.nan, 6.0], equal_nan=True)
    assert table.largest() == [("b", 0, 9.0), ("a", 0, 3.0)]
