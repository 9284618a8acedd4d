"""bench/rehearse.py: tiny models from float to packed to one step, kept and not run again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "bench" / "rehearse.py"


def rehearse(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, "--out", out, "--tiny", "--method", "minmax", *arguments]
    return subprocess.run([str(each) for each in command], capture_output=True, text=True)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal") / "out"
    done = rehearse(folder, "--models", "dit-xl-2,sdxl")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_model_is_packed_saved_and_run(out: Path) -> None:
    for name in ("dit-xl-2", "sdxl"):
        result = json.loads((out / f"{name}.json").read_text())
        assert 0 < result["on_disk"] < result["float_bytes"]
        assert result["resident_bytes"] > result["peak_bytes"] > 0
        assert result["card_bytes"] is None and result["step_seconds"] > 0
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 4 and "sdxl W4A8 minmax (tiny True)" in table[3]


def test_a_finished_model_is_not_run_again_and_a_failed_one_is_a_row(out: Path) -> None:
    kept = json.loads((out / "sdxl.json").read_text())
    (out / "sdxl.json").write_text(json.dumps(kept | {"minutes": 12.5}))
    done = rehearse(out, "--models", "sdxl,pixart", "--layers", "-1", "--size", "1")
    assert "12.5" in done.stdout and done.returncode == 1
    assert "failed" in json.loads((out / "pixart.json").read_text())
