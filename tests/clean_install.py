"""Build the wheel, install it into a fresh environment and use it there: `make wheel-check`.

Everything runs in a temporary folder, outside of the repository and without any extra, so what
works here works for whoever installs the package. The wheel has to hold the native kernels, so
this needs a C++ compiler.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST_BYTES = 10_000_000
# The repository must not be on the import path.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
# The wheel holds the library that is built from the sources, and not the sources.
SOURCES = "lowtide/kernels/native/"
LIBRARY = "lowtide/kernels/_native.abi3.so"
QUANTIZE = "quantize zoo:digits --method tfmq --steps 3 --images 2 --set iters=2 --out w4a8"
DRAW = """
import lowtide
import numpy as np
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("w4a8")
assert any("Packed" in type(module).__name__ for module in pipe.unet.modules())
[image] = pipe(num_inference_steps=3).images
assert image.size == (32, 32), image.size
assert np.asarray(image).std() > 1
print("drew", image.size, "from", lowtide.__file__)
"""
NATIVE = """
from lowtide.kernels.native_library import native

assert native().library is not None, native().reason
print("native kernels for", *native().instruction_sets())
"""


def run(*command: object, cwd: Path) -> None:
    """Run a command and show it."""
    print("$", *[part for part in command if part not in (DRAW, NATIVE)], flush=True)
    subprocess.run(list(map(str, command)), cwd=cwd, env=ENVIRONMENT, check=True)


def error_of(*command: object, cwd: Path) -> str:
    """The error message of a command that must end with exit code 2."""
    arguments = list(map(str, command))
    done = subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 2, done
    return done.stderr.strip().splitlines()[-1]


def build(python: Path, folder: Path) -> Path:
    """The wheel. setuptools would pack files that an earlier build left, so they go first.

    The rest of build/ stays: `make docs` may be writing there.
    """
    for leftover in (ROOT / "build").glob("lib*"):
        shutil.rmtree(leftover)
    run(python, "-m", "pip", "wheel", "--quiet", "--no-deps", ROOT, "-w", folder, cwd=folder)
    [wheel] = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds the files of lowtide/ and the native kernels, no others, and is small."""
    assert not wheel.stem.endswith("-any"), f"{wheel.name} must name the platform it was built on"
    names = set(zipfile.ZipFile(wheel).namelist())
    packed = {name for name in names if ".dist-info/" not in name}
    tracked = tracked_files("lowtide")
    expected = {name for name in tracked if not name.startswith(SOURCES)} | {LIBRARY}
    assert packed == expected, f"missing {expected - packed}, unexpected {packed - expected}"
    size = wheel.stat().st_size
    assert size < MOST_BYTES, f"the wheel has {size:,} bytes; at most {MOST_BYTES:,} are allowed"
    print(f"{wheel.name}: {len(packed)} files, {size:,} bytes", flush=True)


def tracked_files(folder: str) -> set[str]:
    """The files that git holds or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", folder]
    listed = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    return {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}


def use(environment: Path, folder: Path) -> None:
    """Quantize a model, load it through plain diffusers and draw an image."""
    lowtide = environment / "bin" / "lowtide"
    python = environment / "bin" / "python"
    run(lowtide, "--version", cwd=folder)
    run(python, "-c", NATIVE, cwd=folder)
    run(lowtide, *QUANTIZE.split(), cwd=folder)
    run(python, "-c", DRAW, cwd=folder)
    message = error_of(lowtide, "inspect", "zoo:emoji", cwd=folder)
    assert "clone the repository" in message, message
    print(message)


def main() -> None:
    torch = sys.argv[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = folder / "environment"
        python = environment / "bin" / "python"
        run(sys.executable, "-m", "venv", environment, cwd=folder)
        wheel = build(python, folder)
        check_contents(wheel)
        # Only binary packages: nobody who installs lowtide needs a compiler.
        install = [python, "-m", "pip", "install", "--quiet", "--only-binary", ":all:"]
        run(*install, torch, cwd=folder)
        run(*install, wheel, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        use(environment, folder)


if __name__ == "__main__":
    main()
