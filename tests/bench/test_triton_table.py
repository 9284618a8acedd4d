"""The kernel table of bench/gpu, on tiny shapes: errors are small, and a failure stops nothing."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from gpu import kernels


def test_every_tiny_shape_has_a_row(tmp_path):
    out = tmp_path / "kernels.json"
    assert kernels.main(["--models", "tiny", "--batches", "2", "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert [row["shape"] for row in written["rows"]] == [
        "conv 3x3 8 to 12 at 4x4",
        "conv 3x3/2 8 to 12 at 4x4",
        "linear 40 to 12 of 5 tokens",
    ]
    for row in written["rows"]:
        assert row["error"] < 1e-3
        assert row["w4a8_us"] > 0
    assert set(written["machine"]) == {"card", "torch", "triton"}


def test_a_shape_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    measured = kernels.measured

    def fails_once(shape, batch, *, tiles):
        if "/2" in str(shape):
            raise RuntimeError("out of memory")
        return measured(shape, batch, tiles=tiles)

    monkeypatch.setattr(kernels, "measured", fails_once)
    out = tmp_path / "kernels.json"
    assert kernels.main(["--models", "tiny", "--batches", "1", "--out", str(out)]) == 1
    failed = ["failed" in row for row in json.loads(out.read_text())["rows"]]
    assert failed == [False, True, False]
    assert "failed: RuntimeError('out of memory')" in capsys.readouterr().out
