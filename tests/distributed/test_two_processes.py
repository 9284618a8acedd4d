"""Two processes with batch b are one with 2 b; one that dies is a sentence, and its run goes on."""

import json
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shared_work
import tiny
import torch

from lowtide import sampling
from lowtide.workflows import to_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Relative. Found: 1.5e-7 for losses, 6e-7 for roundings while they are learnt, equal tensors.
BOUND = 1e-6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes: another number of threads may add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model and a packed one."""
    place = tmp_path_factory.mktemp("several")
    sampling.as_pipeline(tiny.model("unet2d")).save_pretrained(place / "float")
    options = {"steps": 2, "images": 2, "device": "cpu"}
    to_folder.quantize_to_folder(str(place / "float"), place / "packed", "minmax", options)
    return place


def environment(**changes: object) -> dict[str, str]:
    paths = [ROOT, HERE, HERE.parent]
    values = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": 1} | changes
    return os.environ | {name: str(value) for name, value in values.items()}


def torchrun(home: Path, out: Path, logs: Path, dies_at: int) -> int:
    """The exit code of the command in two processes, the second of which dies in that unit."""
    launch = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        2,
        "--redirects",
        3,
    )
    arguments = (home / "float", "--out", out, *shared_work.COMMAND, 2)
    command = (sys.executable, *launch, "--log-dir", logs, HERE / "dying.py", "quantize")
    done = subprocess.run(
        [*map(str, command), *map(str, arguments)],
        env=environment(XDG_CACHE_HOME=home / "cache", DIES_AT=dies_at),
        capture_output=True,
        check=False,
    )
    return done.returncode


@pytest.fixture(scope="module")
def died(home: Path) -> dict:
    """What each process says, when the second of a command under torchrun dies."""
    logs = home / "logs"
    code = torchrun(home, home / "resumed", logs, dies_at=3)
    units = sorted((home / "resumed.run").glob("*/units/*.safetensors"))
    said = [next(logs.rglob(f"{rank}/stderr.log")).read_text() for rank in (0, 1)]
    return {"code": code, "said": said, "units": [path.name for path in units]}


@pytest.fixture(scope="module")
def together(home: Path, died: dict) -> list[dict]:
    """The results of two processes, which also resume what died."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    address["XDG_CACHE_HOME"] = home / "cache"
    command = [sys.executable, str(HERE / "shared_work.py"), str(home)]
    running = [
        subprocess.Popen(
            command,
            env=environment(RANK=rank, LOCAL_RANK=rank, **address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said[1][-3000:] + said[0][-3000:]
    results = [pickle.loads((home / f"rank-{rank}.pickle").read_bytes()) for rank in (0, 1)]
    return [result | {"said": text} for result, text in zip(results, said, strict=True)]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative L2; equal where both are zero."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30))


def assert_same_integers(ours: torch.Tensor, theirs: torch.Tensor, key: str) -> None:
    """Codes and zero points are equal. A float32 that lies in an int32 table may differ by 8 units
    in its last place, which are 1e-6 of it.
    """
    if not key.endswith(".grid"):
        assert torch.equal(ours, theirs), key
        return
    differs = ours != theirs
    assert (ours - theirs).abs().max() <= 8, key
    assert (theirs[differs] >= 1 << 23).all(), key  # as an integer, no normal float32 is smaller


@pytest.mark.parametrize("name", shared_work.WORK)
def test_two_processes_learn_what_one_learns(name: str, together: list[dict], home: Path) -> None:
    with shared_work.quickly():
        alone = shared_work.quantized(home, *shared_work.WORK[name])
    for result in (each[name] for each in together):
        assert result["batch"] == alone["batch"]
        assert result["losses"].keys() == alone["losses"].keys()
        for unit, pair in alone["losses"].items():
            assert result["losses"][unit] == pytest.approx(pair, rel=BOUND, abs=1e-14), unit
        assert result["state"].keys() == alone["state"].keys()
        for key, value in alone["state"].items():
            if value.is_floating_point():
                assert distance(result["state"][key], value) < BOUND, key
            else:
                assert_same_integers(result["state"][key], value, key)
    # The first process rounds the temporal block of a UNet; of a DiT's, each rounds some units.
    ours = together[0][name]["alphas"]
    assert len(ours) == len(alone["alphas"])
    for mine, theirs in zip(ours, alone["alphas"], strict=True):
        assert distance(mine, theirs) < BOUND


def test_images_come_back_in_order(together: list[dict], home: Path) -> None:
    alone = shared_work.drawn(home)
    assert all(np.array_equal(each["images"], alone) for each in together)


def assert_alike(ours: object, theirs: object) -> None:
    """The same values; numbers to 0.1 %, because another process may add in another order.

    Of a kernel only the name counts: why it was chosen depends on what was raced before.
    """
    if isinstance(theirs, dict):
        assert isinstance(ours, dict) and ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert_alike(ours[name], value)
    elif isinstance(theirs, list | tuple):
        assert isinstance(ours, list | tuple) and len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_alike(mine, other)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-6)
    elif isinstance(theirs, str):
        assert isinstance(ours, str) and ours.partition(":")[0] == theirs.partition(":")[0]
    else:
        assert ours == theirs


def test_an_evaluation_measures_the_same(together: list[dict], home: Path) -> None:
    alone = shared_work.compared(home)
    assert together[0]["evaluation"] == together[1]["evaluation"]
    assert_alike(together[0]["evaluation"], alone)
    pictures = sorted((home / "evidence-1" / "images").rglob("*.png"))
    assert len(pictures) == 10
    for picture in pictures:
        other = home / "evidence-2" / picture.relative_to(home / "evidence-1")
        assert other.read_bytes() == picture.read_bytes()


def test_what_the_processes_tell_each_other(together: list[dict]) -> None:
    first, second = (each["primitives"] for each in together)
    assert first == second
    assert first["gathered"] == list("abcde")
    assert first["total"] == 3.0
    assert first["loss"] == 0.5
    assert first["gradients"] == [[[1.0] * 3] * 2, 2.0]
    assert first["extremes"] == ([1.0, 2.0], [0.0, float("-inf")])
    assert first["first"] == 0
    assert first["wrong"] == "found a; expected b; c"


def test_only_the_first_process_speaks(together: list[dict]) -> None:
    first, second = (each["said"] for each in together)
    assert "device: cpu, and 1 more like it" in first
    ours = re.compile(r"^(?:\w+: .* s|device: .*|Reconstruct: .*)$", re.MULTILINE)
    assert len(ours.findall(first)) > 100
    assert ours.findall(second) == []


def test_a_process_that_dies_ends_the_run_with_one_sentence(died: dict) -> None:
    assert died["code"] != 0
    assert len(died["units"]) >= 3, died
    last = died["said"][0].strip().splitlines()[-1]
    assert last == (
        "error: found that another process of this run has ended; expected all 2 to work until "
        "the end; see what that process said; the same command goes on after the last finished "
        "block."
    )
    assert "Traceback" not in "".join(died["said"])


def test_the_same_command_goes_on(together: list[dict], died: dict, home: Path) -> None:
    """Also in a process that does not see the folder of finished units."""
    learnt = [each["resumed"]["learnt"] for each in together]
    assert [each["resumed"]["code"] for each in together] == [0, 0]
    finished = {name.removesuffix(".safetensors") for name in died["units"]}
    assert len(learnt[1]) > 5
    assert finished.isdisjoint(name.replace(" ", "-") for name in learnt[0] + learnt[1])
    assert not (home / "resumed.run").exists() and list((home / "elsewhere").iterdir()) == []
    record = json.loads((home / "resumed" / "lowtide.json").read_text())
    assert record["report"]["ranks"] == 2
    assert record["report"]["batch"] == 4


def units_learnt(logs: Path) -> int:
    """How many units the first process learnt."""
    said = next(logs.rglob("0/stdout.log")).read_text()
    return int(re.findall(r"^(\d+) units learnt$", said, re.MULTILINE)[-1])


@pytest.mark.slow
def test_a_killed_process_changes_no_byte(home: Path) -> None:
    """Killed while blocks are reconstructed, and gone on with by the same command."""
    assert torchrun(home, home / "whole", home / "logs-whole", dies_at=0) == 0
    place = home / "killed"
    assert torchrun(home, place, home / "logs-killed", dies_at=6) != 0
    units = {path.name for path in (home / "killed.run").glob("*/units/*.safetensors")}
    assert any(name.startswith("Reconstruct-") for name in units), units
    assert not place.exists()
    assert torchrun(home, place, home / "logs-again", dies_at=0) == 0
    learnt = [units_learnt(home / logs) for logs in ("logs-whole", "logs-again")]
    assert learnt[0] - learnt[1] >= 5
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        [ours] = place.rglob(f"unet/{name}")
        assert ours.read_bytes() == (home / "whole" / ours.relative_to(place)).read_bytes(), name
