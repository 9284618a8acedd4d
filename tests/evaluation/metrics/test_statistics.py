"""Statistics are sums over batches: those of two processes add up to those of one."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_networks import features, images, squares

from lowtide.errors import BadInput
from lowtide.evaluation.metrics import Statistics, frechet

WORKER = """
import sys
from tiny_networks import images, squares
rank = int(sys.argv[1])
batches = (images(60)[start : start + 10] for start in range(10 * rank, 60, 20))
squares().statistics(batches).save(sys.argv[2])
"""


def whole(n: int = 60) -> Statistics:
    return squares().statistics([images(n)])


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each process sums every other batch and writes a file."""
    paths = [tmp_path / f"{rank}.npz" for rank in (0, 1)]
    for rank, path in enumerate(paths):
        subprocess.run(
            [sys.executable, "-c", WORKER, str(rank), str(path)],
            cwd=Path(__file__).parent,
            check=True,
        )
    both = Statistics.load(paths[0]) + Statistics.load(paths[1])
    one = whole()
    assert both.n == one.n == 60
    np.testing.assert_allclose(
        both.covariance, one.covariance, rtol=0, atol=1e-10 * np.abs(one.covariance).max()
    )
    reference = squares().statistics([images(50, seed=7)])
    assert frechet(both, reference) == pytest.approx(frechet(one, reference), rel=1e-10)


def test_mean_and_covariance_are_numpys() -> None:
    rows = features(40, 3)
    statistics = Statistics.of(rows[:11]) + Statistics.of(rows[11:])
    np.testing.assert_allclose(statistics.mean, rows.astype(float).mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance, np.cov(rows.astype(float), rowvar=False), rtol=1e-9, atol=1e-12
    )


def test_saved_is_loaded_to_the_bit(tmp_path: Path) -> None:
    whole().save(tmp_path / "mine")
    loaded = Statistics.load(tmp_path / "mine")
    assert (loaded.n, loaded.source, loaded.size) == (60, "squares pooled sha256:0", (16, 16))
    np.testing.assert_array_equal(loaded.outer, whole().outer)
    np.testing.assert_array_equal(loaded.total, whole().total)


def test_spatial_features_are_another_source() -> None:
    spatial = squares().statistics([images(60)], layer="spatial")
    with pytest.raises(BadInput, match="found statistics of squares spatial"):
        frechet(whole(), spatial)


def test_other_weights_do_not_add_up() -> None:
    with pytest.raises(BadInput, match=r"squares pooled sha256:0 .* beside other pooled"):
        squares("other").statistics([images(9)]) + whole()


def test_another_resolution_is_refused() -> None:
    with pytest.raises(
        BadInput,
        match="found images of 32 x 32 and a reference of 16 x 16; expected one resolution",
    ):
        frechet(squares().statistics([images(9, size=32)]), whole())


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(BadInput, match="at least 2 for a covariance"):
        frechet(whole(1), whole())


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", mu=np.zeros(3))
    np.savez(
        tmp_path / "shapes.npz", n=2, total=np.zeros(3), outer=np.eye(2), source="", size=(8, 8)
    )
    np.savez(tmp_path / "nan.npz", n=2, total=np.zeros(1), outer=[[np.nan]], source="", size=(8, 8))
    np.savez(tmp_path / "none.npz", n=0, total=np.zeros(1), outer=np.eye(1), source="", size=(8, 8))
    with open(tmp_path / "array.npz", "wb") as file:
        np.save(file, np.zeros(3))
    whole().save(tmp_path / "whole.npz")
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "truncated.npz").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "text.npz").write_text("hello")
    names = ("other", "shapes", "nan", "none", "array", "truncated", "empty", "text", "missing")
    for name in (f"{name}.npz" for name in names):
        with pytest.raises(BadInput, match="found no statistics in"):
            Statistics.load(tmp_path / name)
