"""The bench of methods: cells are kept, a killed bench continues, the table is exact."""

import pytest
import tiny
import torch

from lowtide import quantization, sampling
from lowtide.errors import BadInput
from lowtide.evaluation.layer_drift import as_read_by
from lowtide.workflows import method_ranks, method_table
from lowtide.workflows.method_table import MethodCell

OPTIONS = {"steps": 3, "images": 2, "calibration_steps": 1, "iters": 2, "batch": 2}


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(
        sampling,
        "load_pipeline",
        lambda source, dtype=torch.float32, device=None: sampling.as_pipeline(
            tiny.model("unet2d").to(dtype)
        ),
    )


def test_cells_are_measured_once_and_kept(model, tmp_path, monkeypatch):
    cells = method_table.grid("minmax,tfmq-tiar", "W8A8,W3A6", (0, 1))
    assert [cell.key for cell in cells[1:3]] == [("minmax", "W8A8", 1), ("tfmq -tiar", "W8A8", 0)]
    lines = method_table.quality("tiny", tmp_path, cells, OPTIONS, images=4)
    assert len(lines) == 8
    by_width = {
        width: [one["psnr"] for one in lines if one["width"] == width] for width in ("W8A8", "W3A6")
    }
    assert min(by_width["W8A8"]) > max(by_width["W3A6"])
    errors = {one["width"]: one["trajectory_error"] for one in lines}
    assert 0 < errors["W8A8"] < errors["W3A6"] < 1
    for measure in ("end_error", "own_error", "temporal_error", "temporal_end_error"):
        by_width = {one["width"]: one[measure] for one in lines}
        assert 0 < by_width["W8A8"] < by_width["W3A6"], measure
    assert all(one["steady_error"] <= one["own_error"] for one in lines)
    assert lines[0]["bytes"] > lines[-1]["bytes"]
    steps = {one["width"]: one["step_error"] for one in lines}
    assert 0 < steps["W8A8"] < steps["W3A6"] < 1

    def forbidden(*args, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(quantization, "quantize", forbidden)
    assert method_table.quality("tiny", tmp_path, cells, OPTIONS, images=4) == lines
    assert len(method_table.finished_cells(tmp_path, lines[0])) == 8
    with pytest.raises(AssertionError, match="measured again"):
        method_table.quality("tiny", tmp_path, cells, OPTIONS | {"iters": 3}, images=4)
    ledger = tmp_path / "tiny.jsonl"
    whole = ledger.read_text()
    ledger.write_text(whole[: len(whole) // 2])
    with pytest.raises(AssertionError, match="measured again"):
        method_table.quality("tiny", tmp_path, cells, OPTIONS, images=4)
    method_table.append_line(tmp_path, lines[-1])
    assert lines[-1] in method_table.finished_cells(tmp_path, lines[0]), (
        "a line written after a torn one was lost"
    )


def test_cells_of_other_weights_are_measured_again(tmp_path, monkeypatch):
    """A bench whose model was replaced under it would otherwise mix two models in one table."""
    measured = []
    cells = method_table.grid("minmax", "W8A8", (0,))
    for seed in (0, 0, 1):
        monkeypatch.setattr(
            sampling,
            "load_pipeline",
            lambda source, seed=seed, **place: sampling.as_pipeline(tiny.model("unet2d", seed)),
        )
        (line,) = method_table.quality("tiny", tmp_path, cells, OPTIONS, images=2)
        measured.append((line["weights"], line["psnr"]))
    assert measured[0] == measured[1] != measured[2]
    assert len(method_table.finished_cells(tmp_path, line)) == 1


def test_the_float_model_against_itself_has_no_error(model, tmp_path):
    (line,) = method_table.quality(
        "tiny", tmp_path, [MethodCell("minmax", "W32A32", 0)], OPTIONS, images=2
    )
    assert line["psnr"] == 100
    errors = [value for name, value in line.items() if name.endswith("_error")]
    assert len(errors) == 7
    assert set(errors) == {0}


def test_one_program_twice_is_no_difference(model, tmp_path):
    """The control of every comparison: the same cell, made twice, is the same to the last digit."""
    cells = method_table.grid("best", "W4A8", (0,))
    pair = [
        method_table.quality("tiny", tmp_path / name, cells, OPTIONS, images=2) for name in "ab"
    ]
    first, second = ({**line, "minutes": 0} for [line] in pair)
    assert first == second


def test_the_page_keeps_a_section_for_each_model():
    made = {
        "options": {"iters": 5, "labels": [0, 1]},
        "images": 4,
        "weights": "abc",
        "width": "W4A8",
        "seed": 0,
        "code": "c0de",
    }
    figures = {
        "psnr": 25.0,
        "trajectory_error": 0.1,
        "step_error": 0.3,
        "bytes": 2000,
        "minutes": 1.0,
    }
    first, other = (
        [made | figures | {"method": name, "model": model}]
        for name, model in (("a", "zoo:one"), ("b", "zoo:two"))
    )
    both = method_ranks.page(other, method_ranks.page(first))
    assert "settings: iters 5, labels (2 of them)" in both
    assert both.index("| W4A8 | a |") < both.index("| W4A8 | b |")
    assert "float weights abc." in both
    better = method_ranks.page([first[0] | {"psnr": 26.0}], both)
    assert better == both.replace("25.00", "26.00", 1)


def test_a_table_of_two_codes_says_so(tmp_path):
    """A cell that is made again replaces the older one; the others keep the code that made them."""
    shared = {
        "model": "m",
        "options": {},
        "images": 4,
        "weights": "abc",
        "format": 2,
        "width": "W4A8",
        "seed": 0,
    }
    figures = {
        "psnr": 25.0,
        "trajectory_error": 0.1,
        "step_error": 0.3,
        "bytes": 2000,
        "minutes": 1.0,
    }
    for method, code in (("a", "old"), ("b", "old"), ("a", "new")):
        method_table.append_line(tmp_path, shared | figures | {"method": method, "code": code})
    cells = method_table.finished_cells(tmp_path, shared)
    assert {cell["method"]: cell["code"] for cell in cells} == {"a": "new", "b": "old"}
    assert [row[-1] for row in method_ranks.rows(cells)] == ["new", "old"]
    assert method_ranks.rows([*cells, cells[0] | {"seed": 1, "code": "old"}])[0][-1] == "new, old"


@pytest.mark.parametrize("names", [{"methods": "magic"}, {"widths": "W4"}, {"widths": "W9A8"}])
def test_mistakes_are_one_sentence(names, model, tmp_path):
    with pytest.raises(BadInput, match="found"):
        cells = method_table.grid(names.get("methods", "minmax"), names.get("widths", "W4A8"), (0,))
        method_table.quality("tiny", tmp_path, cells, OPTIONS, images=2)


def test_a_model_in_half_precision_is_measured_against_float32(model, tmp_path):
    cells = method_table.grid("minmax", "W8A8,W3A6", (0,))
    whole = method_table.quality("tiny", tmp_path, cells, OPTIONS, images=2)
    half = method_table.quality("tiny", tmp_path, cells, OPTIONS | {"dtype": "float16"}, images=2)
    assert whole[0]["weights"] == half[0]["weights"]
    for ours, theirs in zip(half, whole, strict=True):
        assert ours["step_error"] != theirs["step_error"]
        assert ours["step_error"] < theirs["step_error"] + 0.02
        assert ours["temporal_end_error"] < theirs["temporal_end_error"] + 0.05


def test_a_timestep_is_not_rounded_to_half_precision():
    read = as_read_by(
        tiny.model("unet2d").to(torch.bfloat16), [torch.tensor([961.0]), torch.ones(1, 1)]
    )
    assert read[0].item() == 961
    assert read[1].dtype == torch.bfloat16
