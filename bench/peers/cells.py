"""Cells, shared by bench/peers.py and bench/table.py: their environment, processes, and the best.

A cell is one recipe of one peer at one number of bits. This module needs nothing but Python,
because it makes the environment in which the rest runs.
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
from itertools import chain
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
ROOT = HERE.parent
HOME = HERE / ".venv-peers"
RESULTS = HERE / "results"
PYTHON = HOME / ("Scripts" if os.name == "nt" else "bin") / "python"
TORCH = os.environ.get("TORCH", "torch==2.13.0")
PEERS = {
    "lowtide": "lowtide",
    "quanto": "optimum-quanto",
    "torchao": "torchao",
    "sdnq": "SDNQ",
    "openvino": "NNCF + OpenVINO",
    "bitsandbytes": "bitsandbytes",
    "orbitquant": "OrbitQuant",
}
# One batch size for calibration, sampling and timing: exported graphs are made for one shape.
BATCH = 16
# The first and the last layer of a small model.
SLACK = 0.02
QUICK = {"seeds": 16, "steps": 20, "images": 16, "iters": 100, "rounds": 5, "minutes": 10}
Json = dict[str, Any]


def aloud(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Bench:
    """What is measured, and where the results are kept.

    `recipes`: by peer, the names of the recipes to run; a peer that is not in it runs all.
    """

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
        recipes = json.dumps(self.recipes.get(who, []))
        options = {
            "home": self.home,
            "model": model,
            "bits": self.bits,
            "conditions": self.conditions,
            "recipes": recipes,
        } | self.numbers
        arguments = [f"--{name}={value}" for name, value in options.items()]
        command = [str(PYTHON), "-m", "peers.work", who, *arguments]
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
        with (place / "log.txt").open("w") as log:
            code = self.followed(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
            )
        return read(place) or {"cannot": f"crashed, exit code {code}"}

    def followed(self, running: subprocess.Popen) -> int:
        """Pass on each cell's name as it starts; returns the exit code.

        An exception here, such as an interrupt, ends the process too.
        """
        try:
            for text in running.stdout:
                self.say(text.rstrip())
            return running.wait()
        finally:
            running.terminate()
            running.wait()

    def floating(self) -> Json:
        """The float model; made once."""
        result = read(self.home / "float")
        return result if result and "cannot" not in result else self.work("float", self.model)

    def usable_float(self) -> Json:
        """The float model, or an end of the run if it cannot sample."""
        floating = self.floating()
        if "cannot" in floating:
            log = self.home / "float" / "log.txt"
            raise SystemExit(
                f"found {self.model} unusable ({floating['cannot']}); "
                f"expected a model that samples; see {log}."
            )
        return floating

    def cells(self, peer: str) -> list[Json]:
        """Every recipe of one peer."""
        result = self.work(peer, str(self.home / "float" / "model"))
        row = {"peer": peer, "versions": result.get("versions", {})}
        if "cannot" in result:
            row |= {"recipe": "", "cannot": result["cannot"]}
            return [row | {"bits": bits} for bits in self.bits.split(",")]
        return [row | cell | read(self.home / cell["folder"]) for cell in result["cells"]]


def read(place: Path) -> Json:
    path = place / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def install() -> dict[str, str]:
    """Make the peers' environment; returns what could not be installed, with pip's error."""
    record = HOME / "installed.json"
    lines = (HERE / "requirements-peers.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    if record.exists() and json.loads(record.read_text())["wanted"] == [TORCH, *wanted]:
        return json.loads(record.read_text())["refused"]
    venv.create(HOME, with_pip=True)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    others = [need for need in needs if not need.startswith("torch")]
    for line in ([TORCH], others, ["--no-deps", "-e", str(ROOT)]):
        if refused := pip(line):
            raise SystemExit(
                f"found pip unable to install {' '.join(line)} ({refused}); "
                "expected it to; mend that first."
            )
    refused = {line: why for line in wanted if (why := pip([line]))}
    record.write_text(json.dumps({"wanted": [TORCH, *wanted], "refused": refused}, indent=1))
    return refused


def pip(line: list[str]) -> str:
    """Install one line; returns nothing, or pip's last error."""
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
    """An option for each number (of images, steps, ...), and --quick for small numbers of all."""
    quick = ", ".join(f"{name} {number}" for name, number in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=quick)
    for name, number in usual.items():
        parser.add_argument(f"--{name}", type=int, help=f"default {number}")


def numbers_of(options: argparse.Namespace, usual: dict[str, int]) -> dict[str, int]:
    """The options' numbers; a missing one is as usual, or as in QUICK with --quick."""
    numbers = {name: (QUICK if options.quick else usual)[name] for name in usual}
    for name in usual:
        if getattr(options, name) is not None:
            numbers[name] = getattr(options, name)
    for name in ("seeds", "images"):
        if numbers[name] % BATCH:
            raise SystemExit(
                f"found --{name} {numbers[name]}; expected a multiple of {BATCH}, the batch; "
                "round it."
            )
    return numbers


def home_of(model: str, conditions: str, numbers: dict[str, int]) -> Path:
    """Where finished cells are kept: one folder for the same weights, conditions and numbers."""
    counted = {name: number for name, number in numbers.items() if name != "minutes"}
    identity = json.dumps([model, conditions, counted, weights_of(model)])
    key = hashlib.sha256(identity.encode()).hexdigest()[:8]
    return ROOT / "runs" / "peers" / f"{model.replace(':', '-').replace('/', '-')}-{key}"


def weights_of(model: str) -> str:
    """A hash of the weight files: a zoo model may be trained further between two runs.

    A model that has no files here, such as a hub id, has the hash of nothing.
    """
    name = model.removeprefix("zoo:")
    homes = [ROOT / "zoo" / name, ROOT / "lowtide" / "zoo" / name]
    places = homes if name != model else [Path(model)]
    digest = hashlib.sha256()
    for file in sorted(chain.from_iterable(place.rglob("*.safetensors") for place in places)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def usable(cell: Json) -> bool:
    return "cannot" not in cell and cell["finite"]


def versions_of(cells: list[Json]) -> str:
    """The packages behind these cells, with their versions."""
    versions: dict[str, str] = {}
    for cell in cells:
        versions |= cell["versions"]
    return (
        ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + f", {TORCH}."
    )


def best(cells: list[Json]) -> Json:
    """The recipe that quantizes most, and among equals the nearest to the float model."""

    def rank(cell: Json) -> tuple:
        return usable(cell), round(covered(cell), 2), cell.get("psnr", 0.0)

    return max(cells, key=rank)


def covered(cell: Json) -> float:
    """The share of weights in layers that are quantized as the cell's bits say, or at least partly.

    Weights below float count, and at fewer than 16 bits for inputs, so must the inputs be.
    """
    if not usable(cell):
        return 0.0
    inputs = int(cell["bits"].split("a")[1])
    stored = 1 - cell["share"]["weights"].get("32", 0.0)
    return min(stored, 1 - cell["share"]["inputs"].get("32", 0.0)) if inputs < 16 else stored
