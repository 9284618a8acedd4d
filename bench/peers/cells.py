"""Cells: what bench/peers.py and bench/table.py share: the peers' environment, a process for each peer, which cell is best.

Needs nothing but Python, for it makes the environment in which the rest runs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
HOME, RESULTS = HERE / ".venv-peers", HERE / "results"
PYTHON = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
PEERS = {
    "lowtide": "lowtide",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "sdnq": "SDNQ",
    "openvino": "NNCF + OpenVINO",
    "bitsandbytes": "bitsandbytes",
}
# One size for calibration, sampling and timing: exported and compiled graphs are made for one shape.
BATCH = 16
# The first and the last layer of a small model.
SLACK = 0.02
QUICK = {"seeds": 16, "steps": 20, "images": 16, "iters": 100, "rounds": 5, "minutes": 10}
Json = dict[str, Any]


def aloud(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bench:
    """What is measured, and where its pieces are kept. `recipes` names those of a peer that are run; all, where it is silent."""

    model: str
    bits: str
    conditions: str
    numbers: dict[str, int]
    home: Path
    recipes: dict[str, list[str]] = field(default_factory=dict)
    say: Callable[[str], None] = aloud

    def work(self, who: str, model: str) -> Json:
        """One run of peers/work.py: what it wrote, or why there is nothing."""
        place = self.home / who
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").unlink(missing_ok=True)
        asked = {
            "bits": self.bits,
            "conditions": self.conditions,
            "recipes": json.dumps(self.recipes.get(who, [])),
        }
        options = {"home": self.home, "model": model} | asked | self.numbers
        command = [
            str(PYTHON),
            "-m",
            "peers.work",
            who,
            *(f"--{name}={value}" for name, value in options.items()),
        ]
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
        with (place / "log.txt").open("w") as log:
            code = self.listened(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
            )
        return read(place) or {"cannot": f"crashed, exit code {code}"}

    def listened(self, running: subprocess.Popen) -> int:
        """Pass on each cell's name as it starts, and hand back the exit code. Whatever ends this ends the work too."""
        try:
            for text in running.stdout:
                self.say(text.rstrip())
            return running.wait()
        finally:
            running.terminate()
            running.wait()

    def floating(self) -> Json:
        """The float model; made once."""
        found = read(self.home / "float")
        return found if found and "cannot" not in found else self.work("float", self.model)

    def cells(self, peer: str) -> list[Json]:
        """Every recipe of one peer."""
        found = self.work(peer, str(self.home / "float" / "model"))
        row = {"peer": peer, "versions": found.get("versions", {})}
        if "cannot" in found:
            return [
                row | {"bits": bits, "recipe": "", "cannot": found["cannot"]}
                for bits in self.bits.split(",")
            ]
        return [row | cell | read(self.home / cell["folder"]) for cell in found["cells"]]


def read(place: Path) -> Json:
    path = place / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def install() -> dict[str, str]:
    """The environment of the peers; what could not be installed, and pip's own words."""
    kept = HOME / "installed.json"
    wanted = [
        line
        for line in (HERE / "requirements-peers.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    if kept.exists() and json.loads(kept.read_text())["wanted"] == [TORCH, *wanted]:
        return json.loads(kept.read_text())["refused"]
    venv.create(HOME, with_pip=True)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in (
        [TORCH],
        [need for need in needs if not need.startswith("torch")],
        ["--no-deps", "-e", str(ROOT)],
    ):
        if refused := pip(line):
            raise SystemExit(
                f"found pip unable to install {' '.join(line)} ({refused}); expected it to; mend that first."
            )
    refused = {line: why for line in wanted if (why := pip([line]))}
    kept.write_text(json.dumps({"wanted": [TORCH, *wanted], "refused": refused}, indent=1))
    return refused


def pip(line: list[str]) -> str:
    """Empty when it went well, else pip's last error."""
    print(f"installing {' '.join(line)}", file=sys.stderr, flush=True)
    ended = subprocess.run(
        [str(PYTHON), "-m", "pip", "install", "-q", *line],
        capture_output=True,
        text=True,
        check=False,
    )
    errors = [text for text in ended.stderr.splitlines() if text.startswith("ERROR")]
    return "" if ended.returncode == 0 else (errors or ["pip failed"])[-1][:160]


def ask_numbers(parser: argparse.ArgumentParser, usual: dict[str, int]) -> None:
    """How many images, steps and so on: each an option, and --quick for few of all."""
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"{', '.join(f'{name} {number}' for name, number in QUICK.items())}",
    )
    for name, number in usual.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {number}")


def numbers_of(given: argparse.Namespace, usual: dict[str, int]) -> dict[str, int]:
    """The answers; what was not answered is as usual, or as --quick says."""
    told = {name: number for name in usual if (number := getattr(given, name)) is not None}
    numbers = {name: (QUICK if given.quick else usual)[name] for name in usual} | told
    for name in ("seeds", "images"):
        if numbers[name] % BATCH:
            raise SystemExit(
                f"found --{name} {numbers[name]}; expected a multiple of {BATCH}, the batch; round it."
            )
    return numbers


def home_of(model: str, conditions: str, numbers: dict[str, int]) -> Path:
    """Where finished cells are kept: another place for other weights, conditions or numbers."""
    asked = [
        model,
        conditions,
        {name: number for name, number in numbers.items() if name != "minutes"},
        weights_of(model),
    ]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return ROOT / "runs" / "peers" / f"{model.replace(':', '-').replace('/', '-')}-{key}"


def weights_of(model: str) -> str:
    """A hash of the files with weights, for a zoo model may be trained on between two runs; empty for what lies elsewhere."""
    name = model.removeprefix("zoo:")
    places = (
        [ROOT / "zoo" / name, ROOT / "lowtide" / "zoo" / name] if name != model else [Path(model)]
    )
    digest = hashlib.sha256()
    for file in sorted(file for place in places for file in place.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def usable(cell: Json) -> bool:
    return "cannot" not in cell and cell["finite"]


def best(found: list[Json]) -> Json:
    """The recipe that does most of what was asked, and of those the nearest to the float model."""
    return max(
        found, key=lambda cell: (usable(cell), round(covered(cell), 2), cell.get("psnr", 0.0))
    )


def covered(cell: Json) -> float:
    """The share of weights in layers whose weights and inputs both are in the bits asked for, or fewer than float at least."""
    if not usable(cell):
        return 0.0
    inputs = int(cell["bits"].split("a")[1])
    stored = 1 - cell["share"]["weights"].get("32", 0.0)
    return min(stored, 1 - cell["share"]["inputs"].get("32", 0.0)) if inputs < 16 else stored
