"""The tiny models and commands that faults are tried on; the models are made once."""

from pathlib import Path
from typing import Any

import tiny_pipelines

import lowtide
from faulty.kills import Case
from lowtide.checkpoint import seal
from lowtide.checkpoint.manifest import write_manifest
from lowtide.workflows.sampled_folder import sample_to_folder
from lowtide.workflows.to_folder import quantize_to_folder

OPTIONS: dict[str, Any] = {
    "steps": 3, "images": 2, "calibration_steps": 2, "batch": 2, "iters": 2,
}  # fmt: skip
METHODS = ("tfmq", "mpq", "best")


def made(home: Path) -> list[Path]:
    """best and mpq on a UNet, tfmq on Stable Diffusion, and a model in several files."""
    names = ("best", "mpq", "tfmq", "shards")
    if not all((home / name).is_dir() for name in names):
        home.mkdir(parents=True, exist_ok=True)
        lowtide.quantize(tiny_pipelines.ddim(home), method="best", **OPTIONS).save(home / "best")
        mpq = lowtide.quantize(tiny_pipelines.ddim(home), method="mpq", **OPTIONS)
        mpq.save(home / "mpq")
        in_several_files(mpq, home / "shards")
        text = tiny_pipelines.stable_diffusion(home)
        tfmq = lowtide.quantize(text, method="tfmq", prompts=("ab", "c"), **OPTIONS)
        tfmq.save(home / "tfmq")
    return [home / name for name in names]


def in_several_files(result: lowtide.Quantized, folder: Path) -> Path:
    """A model as lowtide writes it where it is larger than one file may be."""
    result.pipe.save_pretrained(folder, max_shard_size="50KB")
    seal.finish(folder)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    write_manifest(folder, [path.relative_to(folder).as_posix() for path in paths])
    return folder


def pair(home: Path) -> tuple[Path, Path]:
    """Two models that differ in scheduler, configuration and weights."""
    places = (home / "first", home / "second")
    for place, betas, epsilon in zip(places, (0.02, 0.03), (1e-5, 1e-3), strict=True):
        if not place.is_dir():
            home.mkdir(parents=True, exist_ok=True)
            pipe = tiny_pipelines.ddim(home)
            pipe.unet.register_to_config(norm_eps=epsilon)
            pipe.scheduler.register_to_config(beta_end=betas)
            bits = 8 if epsilon < 1e-4 else 4
            lowtide.quantize(pipe, method="minmax", steps=2, images=1, weights=bits).save(place)
    return places


def cases(home: Path) -> list[Case]:
    """quantize by three methods, save and sample, each over an older result."""
    packed = pair(home)[0]
    source = home / "float"
    if not source.is_dir():
        tiny_pipelines.ddim(home).save_pretrained(source)
    older = home / "images"
    if not older.is_dir():
        _sampled(packed, older, (5,))
    found = [Case(name, _quantizing(source, name), packed) for name in METHODS]
    found.append(Case("save", lambda place: _saved(home / "second", place), packed))
    return [*found, Case("sample", lambda place: _sampled(packed, place, (0, 1)), older)]


def _quantizing(source: Path, method: str) -> Any:
    return lambda place: quantize_to_folder(str(source), place, method, dict(OPTIONS))


def _saved(model: Path, place: Path) -> None:
    lowtide.save(lowtide.load(model), place)


def _sampled(model: Path, place: Path, seeds: tuple[int, ...]) -> None:
    request = lowtide.Request(steps=2, seeds=seeds, batch=1)
    sample_to_folder(str(model), place, request)
