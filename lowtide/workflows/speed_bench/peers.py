"""Other libraries in a speed measurement: which there are, which are here, and how they are run.

They run through bench/speed_peers.py of a checkout, with this Python if it has the library, else
with that of bench/.venv-peers, which `make peers` makes.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lowtide.errors import BadInput
from lowtide.workflows.speed_bench.channel import ROOT, Ended, environment, last_line

SCRIPT = ROOT / "bench" / "speed_peers.py"
ENVIRONMENT = ROOT / "bench" / ".venv-peers" / "bin" / "python"
# The variants that torch itself has, by the name of the peer.
TORCH = {"torch": "torch-bf16", "compile": "compile"}
TITLES = {
    "openvino-fp32": "OpenVINO fp32",
    "openvino-int8": "OpenVINO int8 (NNCF)",
    "openvino-int8-bf16": "OpenVINO int8 (NNCF), bf16 hint",
    "onnxruntime-fp32": "ONNX Runtime fp32",
    "onnxruntime-int8": "ONNX Runtime int8 (QDQ)",
}
# The packages of a peer: the first is needed, the others for some of its variants.
PACKAGES = {
    "openvino": ("openvino", "nncf"),
    "onnxruntime": ("onnxruntime", "onnx", "onnxscript"),
}
NAMES = (*PACKAGES, *TORCH)
FIND = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"


def check_names(names: Sequence[str]) -> None:
    for name in names:
        if name not in NAMES:
            raise BadInput(
                f"found the peer {name}", f"some of {', '.join(NAMES)}", "correct --against"
            )


@dataclass(frozen=True)
class Conversion:
    """One variant of another library: `prepare` converts the float model, `run` takes steps."""

    variant: str
    model: str
    calls: Path
    kept: Path
    threads: int

    def command(self, what: str) -> list[str]:
        python = interpreter(self.variant.partition("-")[0])
        assert python is not None
        paths = [str(each.resolve()) for each in (self.calls, self.kept)]
        return [python, str(SCRIPT), what, self.variant, self.model, *paths, str(self.threads)]


def variants(name: str) -> list[str]:
    return [variant for variant in TITLES if variant.startswith(f"{name}-")]


def reason_against(name: str) -> str:
    """Why a peer cannot be measured, and what to do; empty if it can."""
    if not SCRIPT.exists():
        return f"{name} was left out: it is run from a checkout of lowtide, by bench/speed_peers.py"
    missing = [package for package in PACKAGES[name] if interpreter_of(package) is None]
    if missing:
        packages = " ".join(PACKAGES[name])
        return f"{name} was left out: {missing[0]} is not installed; pip install {packages}"
    return ""


def interpreter(name: str) -> str | None:
    return interpreter_of(PACKAGES[name][0])


@cache
def interpreter_of(package: str) -> str | None:
    """A Python that has the package: this one, or that of the peers' environment."""
    for python in (sys.executable, str(ENVIRONMENT)):
        if Path(python).exists():
            found = subprocess.run([python, "-c", FIND, package], check=False)
            if found.returncode == 0:
                return python
    return None


def prepare(work: Conversion, log: Path) -> None:
    """Convert the float model in a process of its own, whose memory does not count."""
    with log.open("w") as file:
        ended = subprocess.run(
            work.command("prepare"),
            env=environment(work.threads),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            check=False,
        )
    if ended.returncode:
        raise Ended(f"its conversion failed: {last_line(log)}")
