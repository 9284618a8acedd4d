"""Every part of bench/gpu runs end to end on a CPU, and one failure stops nothing else."""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gpu import part, table

ROOT = Path(__file__).parents[2]
PARTS = ("devices", "methods", "kernels", "steps", "minutes")
NEEDED = [name for name in PARTS if name != "kernels" or find_spec("triton")]


def sheet(out: Path, *, seconds: float = 60, resume: bool = False) -> part.Sheet:
    given = argparse.Namespace(out=out, device="cpu", tiny=True, seconds=seconds, resume=resume)
    return part.Sheet("devices", given)


def run(*arguments: object, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    command = [ROOT / "bench" / "gpu" / "run.sh", *arguments, "--device", "cpu", "--tiny"]
    environment = os.environ | {"PYTHON": python}
    return subprocess.run(
        [str(each) for each in command], capture_output=True, text=True, env=environment
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "out"
    done = run(*NEEDED, "--out", out)
    assert done.returncode == 0, (out / "log.txt").read_text()[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDED)
def test_a_part_passes_and_keeps_its_rows(name: str, folder: Path) -> None:
    content = json.loads((folder / f"{name}.json").read_text())
    assert len(content["rows"]) > 1
    assert content["machine"]["torch"] == torch.__version__
    assert not [row for row in content["rows"] if "failed" in row]
    [status] = [line for line in (folder / "status.txt").read_text().splitlines() if name in line]
    assert status.split()[:2] == [name, "0"]


@pytest.mark.slow
def test_the_folder_has_one_table_and_few_files(folder: Path) -> None:
    """At most eight files, which is what a machine may send back."""
    text = (folder / "table.md").read_text()
    assert all(f"| {name} | passed |" in text for name in NEEDED)
    files = {path.name for path in folder.iterdir()}
    assert files == {f"{name}.json" for name in NEEDED} | {"log.txt", "status.txt", "table.md"}


def test_what_ends_a_part_stops_no_other(tmp_path: Path) -> None:
    """An interpreter that hangs, then loses the card once, then fails."""
    python = tmp_path / "python"
    python.write_text(
        """#!/usr/bin/env bash
        case "$2 $*" in
            gpu.devices*) exec sleep 30 ;;
            gpu.methods*--resume*) exit 0 ;;
            gpu.methods*) echo "{}" >"$4" && exit 3 ;;
            gpu.table*) echo "## what passed" ;;
            *) exit 9 ;;
        esac
        """
    )
    python.chmod(0o755)
    parts = ("devices", "methods", "steps")
    done = run(*parts, "--out", tmp_path / "out", "--limit", 16, python=str(python))
    lines = (tmp_path / "out" / "status.txt").read_text().splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["devices", "124"],
        ["methods", "0"],
        ["steps", "9"],
    ]
    assert done.returncode == 1
    assert done.stdout == "## what passed\n"


@pytest.mark.parametrize("arguments", [("nothing", "--out", "x"), ("devices",), ("--limit", "0")])
def test_wrong_arguments_are_refused(arguments, tmp_path: Path) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "usage: bench/gpu/run.sh" in done.stderr


def test_a_row_that_fails_or_takes_too_long_is_a_row(tmp_path: Path) -> None:
    def breaks() -> part.Row:
        raise RuntimeError("out of memory")

    rows = sheet(tmp_path / "devices.json")
    rows.measure({"model": "a"}, breaks)
    rows.measure({"model": "b"}, lambda: time.sleep(5) or {}, seconds=0.1)
    rows.measure({"model": "c"}, lambda: {"error": 0.5})
    late = sheet(tmp_path / "devices.json", seconds=-1, resume=True)
    late.measure({"model": "d"}, lambda: {"error": 0.5})
    assert rows.code() == part.FAILED
    found = [row.get("failed") for row in json.loads(late.out.read_text())["rows"]]
    assert found == ["RuntimeError: out of memory", "TimeOver: longer than 0 s", None, part.LATE]
    assert table.counts(late.rows) == [1, 2, 0, 1]


def test_a_resumed_part_goes_on_behind_the_row_that_ended_it(tmp_path: Path) -> None:
    out = tmp_path / "devices.json"
    first = sheet(out)
    first.measure({"model": "a"}, lambda: {"error": 0.5})
    with pytest.raises(KeyboardInterrupt):
        first.measure({"model": "b"}, interrupted)
    second = sheet(out, resume=True)
    for model in "abc":
        second.measure({"model": model}, lambda: {"error": 0.25})
    assert [(row["model"], row.get("error")) for row in second.rows] == [
        ("a", 0.5),
        ("b", None),
        ("c", 0.25),
    ]
    assert second.rows[1]["failed"] == part.STARTED
    assert second.code() == part.FAILED


def interrupted() -> part.Row:
    raise KeyboardInterrupt
