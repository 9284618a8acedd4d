"""A float model and its packed self, tiny, as folders that the tests of evidence share."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import tiny

from lowtide import sampling
from lowtide.workflows import to_folder

QUICK = {"steps": 3, "images": 2, "calibration_steps": 1, "iters": 2, "batch": 2}


@cache
def kept() -> TemporaryDirectory:
    """Gone when the tests end."""
    return TemporaryDirectory(prefix="lowtide-test-")


@cache
def pair(method: str = "minmax", weights: int = 4) -> tuple[Path, Path]:
    """The folders of the float model and of the packed one."""
    home = Path(kept().name) / f"{method}-{weights}"
    sampling.as_pipeline(tiny.model("unet2d")).save_pretrained(home / "model")
    to_folder.quantize_to_folder(
        str(home / "model"), home / "run", method, QUICK | {"weights": weights, "inputs": 8}
    )
    return home / "model", home / "run"
