"""A tiny float model and its packed version, as folders that the evaluation tests share."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny

from lowtide import sampling
from lowtide.methods import relevant_options
from lowtide.workflows import to_folder

QUICK = {"steps": 3, "images": 2, "calibration_steps": 1, "iters": 2, "batch": 2}


@cache
def _folder() -> TemporaryDirectory:
    """Deleted when the tests end."""
    return TemporaryDirectory(prefix="lowtide-test-")


@cache
def pair(method: str = "minmax", weights: int = 4) -> tuple[Path, Path]:
    """The folders of the float model and of the packed one."""
    home = Path(_folder().name) / f"{method}-{weights}"
    sampling.as_pipeline(tiny.model("unet2d")).save_pretrained(home / "model")
    settings = relevant_options(method, QUICK | {"weights": weights, "inputs": 8})
    to_folder.quantize_to_folder(str(home / "model"), home / "run", method, settings)
    return home / "model", home / "run"
