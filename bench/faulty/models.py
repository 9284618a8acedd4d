"""The tiny packed models that faults are tried on: made once, in folders as lowtide writes them."""

from pathlib import Path

import tiny_pipelines

import lowtide
from lowtide.checkpoint import seal
from lowtide.checkpoint.manifest import write_manifest

OPTIONS = {"steps": 3, "images": 2, "calibration_steps": 2, "batch": 2, "iters": 2}


def made(home: Path) -> list[Path]:
    """best and mpq on a UNet, tfmq on Stable Diffusion, and a model in several files."""
    home.mkdir(parents=True, exist_ok=True)
    best = lowtide.quantize(tiny_pipelines.ddim(home), method="best", **OPTIONS)
    mpq = lowtide.quantize(tiny_pipelines.ddim(home), method="mpq", **OPTIONS)
    text = tiny_pipelines.stable_diffusion(home)
    tfmq = lowtide.quantize(text, method="tfmq", prompts=("ab", "c"), **OPTIONS)
    folders = [best.save(home / "best"), mpq.save(home / "mpq"), tfmq.save(home / "tfmq")]
    return [*folders, in_several_files(mpq, home / "shards")]


def in_several_files(result: lowtide.Quantized, folder: Path) -> Path:
    """A model as lowtide writes it where it is larger than one file may be."""
    result.pipe.save_pretrained(folder, max_shard_size="50KB")
    seal.finish(folder)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, [path.relative_to(folder).as_posix() for path in paths])
    return folder
