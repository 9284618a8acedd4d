"""A tiny packed model and its float model, as folders."""

from pathlib import Path

import tiny

from lowtide import sampling
from lowtide.methods import relevant_options
from lowtide.workflows import to_folder

QUICK = {"steps": 3, "images": 2, "calibration_steps": 1, "iters": 2, "batch": 2}


def packed_and_float(home: Path) -> tuple[Path, Path]:
    """The folders of the packed model and of the float one."""
    sampling.as_pipeline(tiny.model("unet2d")).save_pretrained(home / "model")
    settings = relevant_options("minmax", QUICK)
    to_folder.quantize_to_folder(str(home / "model"), home / "packed", "minmax", settings)
    return home / "packed", home / "model"
