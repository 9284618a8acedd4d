"""Peers side by side: the same weights, bits, seeds and metrics for lowtide and for what else can quantize a denoiser on a CPU.

    python bench/peers.py [--model zoo:digits] [--bits w8a8,w4a8,...] [--only quanto,torchao]

Needs nothing but Python: it makes bench/.venv-peers, installs lowtide and every line of requirements-peers.txt there, and runs
each recipe of bench/peers/*.py in a process of its own, so that a crash is a cell and not the end. Finished cells are kept in
runs/peers: an interrupted run goes on, and --fresh forgets them. Writes bench/results/peers.json (every recipe) and peers.md
(the best of each).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
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
BITS = "w8a8,w4a8,w4a16,w3a16,w2a16"
NUMBERS = {"seeds": 64, "steps": 50, "images": 32, "iters": 1000, "rounds": 15, "minutes": 30}
Json = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What is measured, and where its pieces are kept."""

    model: str
    bits: str
    conditions: str
    numbers: dict[str, int]
    home: Path

    def work(self, who: str, model: str) -> Json:
        """One run of peers/work.py: what it wrote, or why there is nothing."""
        place = self.home / who
        place.mkdir(parents=True, exist_ok=True)
        (place / "result.json").unlink(missing_ok=True)
        options = {"home": self.home, "model": model, "bits": self.bits, "conditions": self.conditions} | self.numbers
        command = [str(PYTHON), "-m", "peers.work", who, *(f"--{name}={value}" for name, value in options.items())]
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path}
        with (place / "log.txt").open("w") as log:
            code = subprocess.run(command, env=env, stdout=sys.stderr, stderr=log, check=False).returncode
        return read(place) or {"cannot": f"crashed, exit code {code}"}

    def floating(self) -> Json:
        """The float model; made once."""
        found = read(self.home / "float")
        return found if found and "cannot" not in found else self.work("float", self.model)

    def cells(self, peer: str) -> list[Json]:
        """Every recipe of one peer."""
        found = self.work(peer, str(self.home / "float" / "model"))
        row = {"peer": peer, "versions": found.get("versions", {})}
        if "cannot" in found:
            return [row | {"bits": bits, "recipe": "", "cannot": found["cannot"]} for bits in self.bits.split(",")]
        return [row | {name: cell[name] for name in ("bits", "recipe")} | read(Path(cell["folder"])) for cell in found["cells"]]


def read(place: Path) -> Json:
    path = place / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


def install() -> dict[str, str]:
    """The environment of the peers; what could not be installed, and pip's own words."""
    kept = HOME / "installed.json"
    wanted = [line for line in (HERE / "requirements-peers.txt").read_text().splitlines() if line and not line.startswith("#")]
    if kept.exists() and json.loads(kept.read_text())["wanted"] == [TORCH, *wanted]:
        return json.loads(kept.read_text())["refused"]
    venv.create(HOME, with_pip=True)
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for line in ([TORCH], [need for need in needs if not need.startswith("torch")], ["--no-deps", "-e", str(ROOT)]):
        if refused := pip(line):
            raise SystemExit(f"found pip unable to install {' '.join(line)} ({refused}); expected it to; mend that first.")
    refused = {line: why for line in wanted if (why := pip([line]))}
    kept.write_text(json.dumps({"wanted": [TORCH, *wanted], "refused": refused}, indent=1))
    return refused


def pip(line: list[str]) -> str:
    """Empty when it went well, else pip's last error."""
    print(f"installing {' '.join(line)}", file=sys.stderr, flush=True)
    ended = subprocess.run([str(PYTHON), "-m", "pip", "install", "-q", *line], capture_output=True, text=True, check=False)
    errors = [text for text in ended.stderr.splitlines() if text.startswith("ERROR")]
    return "" if ended.returncode == 0 else (errors or ["pip failed"])[-1][:160]


def usable(cell: Json) -> bool:
    return "cannot" not in cell and cell["finite"]


def best(found: list[Json]) -> Json:
    """The recipe that does most of what was asked, and of those the nearest to the float model."""
    return max(found, key=lambda cell: (usable(cell), round(covered(cell), 2), cell.get("psnr", 0.0)))


def covered(cell: Json) -> float:
    """The share of weights in layers whose weights and inputs both are in the bits asked for, or fewer than float at least."""
    if not usable(cell):
        return 0.0
    inputs = int(cell["bits"].split("a")[1])
    stored = 1 - cell["share"]["weights"].get("32", 0.0)
    return min(stored, 1 - cell["share"]["inputs"].get("32", 0.0)) if inputs < 16 else stored


def spread(share: dict[str, float]) -> str:
    """Such as "4: 99.9 %, 8: 0.1 %"."""
    named = {("float" if int(bits) >= 16 else bits): part for bits, part in share.items()}
    return ", ".join(f"{bits}: {100 * part:.3g} %" for bits, part in named.items())


def line(cell: Json, others: list[Json]) -> list[str]:
    """One row of the table."""
    who = lowtide_name(cell) if cell["peer"] == "lowtide" else PEERS[cell["peer"]]
    if not usable(cell):
        return [who, cell["recipe"], "cannot", "", "", "", "", cell.get("cannot", "its images are not finite")]
    theirs, ours = (cell[name] for name in ("seconds_per_step", "float_seconds_per_step"))
    speed = f"{theirs['seconds']:.3f} ({ours['seconds'] / theirs['seconds']:.2f}x)"
    size = f"{cell['bytes'] / 1e6:.2f}" if cell["bytes"] else "–"
    shares = [spread(cell["share"][kind]) for kind in ("weights", "inputs")]
    return [who, cell["recipe"], f"{cell['psnr']:.2f}", speed, size, *shares, remarks(cell, others)]


def lowtide_name(cell: Json) -> str:
    return f"**lowtide {cell['recipe']}**"


def remarks(cell: Json, others: list[Json]) -> str:
    failed = [f"{other['recipe']}: {other['cannot']}" for other in others if "cannot" in other]
    left = f"{len(cell['left'])} of {cell['layers']} layers' weights in float" if cell["left"] else ""
    more = sum(part for bits, part in cell["share"]["weights"].items() if int(cell["bits"][1]) < int(bits) < 16)
    wider = f"{100 * more:.0f} % of weights in more bits than asked" if more > SLACK else ""
    return "; ".join(filter(None, (left, wider, cell["note"], cell.get("save", ""), *failed)))


# The first and the last layer of a small model.
SLACK = 0.02
HEAD = ("who", "recipe", "PSNR dB", "s a step (x float)", "MB", "weights' bits", "inputs' bits", "remarks")


def table(found: list[Json], bits: str) -> list[str]:
    """The rows at one number of bits: lowtide's methods each, and the best recipe of each peer."""
    own = [cell for cell in found if cell["bits"] == bits]
    rows = [line(cell, []) for cell in own if cell["peer"] == "lowtide"]
    groups = [[cell for cell in own if cell["peer"] == peer] for peer in PEERS if peer != "lowtide"]
    rows += [line(best(group), group) for group in groups if group]
    rows = [[text.replace("|", "/") for text in row] for row in rows]
    return [f"### {bits.upper()}", "", *(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows)), ""]


HOW = (
    "Seconds a step: median of calls on 16 images, one thread, float32 between layers, interleaved with the float model in the "
    "same process; the factor is the speed against it (above 1 is faster). A peer's first and last layer may keep 8 bits, as "
    "lowtide's do. Of a peer's recipes the one that quantizes most is shown, the best PSNR among equals; the JSON has them all."
)


def page(result: Json) -> str:
    numbers, model, floating = result["numbers"], result["model"], result["float"]
    versions = {name: number for cell in result["cells"] for name, number in cell["versions"].items()}
    convolved = 100 * floating["in_convolutions"] / floating["weights"]
    what = (
        f"{numbers['seeds']} images from the same seeds, {numbers['steps']} steps, PSNR to the float model's images. The float "
        f"denoiser (weights {floating['fingerprint']}) takes {floating['bytes'] / 1e6:.2f} MB on disk; {convolved:.0f} % of the "
        f"weights of its {floating['layers']} layers are in convolutions. Calibration, where a peer has one: the same "
        f"{numbers['images']} trajectories. {HOW} lowtide's tfmq ran {numbers['iters']} iterations a block."
    )
    made = ", ".join(f"{name} {number}" for name, number in sorted(versions.items())) + f", {TORCH}."
    intro = [f"# {model}: lowtide and its peers", "", what, "", made, ""]
    intro += [f"Could not be installed: {name}: {why}" for name, why in result["refused"].items()]
    bits = list(dict.fromkeys(cell["bits"] for cell in result["cells"]))
    return "\n".join([*intro, *(row for each in bits for row in table(result["cells"], each))])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="zoo:digits")
    parser.add_argument("--bits", default=BITS)
    parser.add_argument("--only", default=",".join(PEERS), help="peers, comma-separated")
    parser.add_argument("--conditions", default="{}", help='JSON, such as {"labels": [0, 1], "guidance": 4}')
    parser.add_argument("--out", type=Path, default=RESULTS / "peers.json")
    parser.add_argument("--fresh", action="store_true", help="forget finished cells")
    for name, number in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    return parser.parse_args()


def prepared(given: argparse.Namespace) -> Bench:
    numbers = {name: getattr(given, name) for name in NUMBERS}
    for name in ("seeds", "images"):
        if numbers[name] % 16:
            raise SystemExit(f"found --{name} {numbers[name]}; expected a multiple of 16, the batch; round it.")
    asked = json.dumps([given.model, given.conditions, {name: number for name, number in numbers.items() if name != "minutes"}])
    key = f"{given.model.replace(':', '-').replace('/', '-')}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
    home = ROOT / "runs" / "peers" / key
    if given.fresh:
        shutil.rmtree(home, ignore_errors=True)
    return Bench(given.model, given.bits, given.conditions, numbers, home)


def main() -> None:
    given = arguments()
    bench, refused = prepared(given), install()
    floating = bench.floating()
    if "cannot" in floating:
        log = bench.home / "float" / "log.txt"
        raise SystemExit(f"found {given.model} unusable ({floating['cannot']}); expected a model that samples; see {log}.")
    result = {"model": given.model, "numbers": bench.numbers, "float": floating, "refused": refused, "cells": []}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    for peer in given.only.split(","):
        result["cells"] += bench.cells(peer)
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.out.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
