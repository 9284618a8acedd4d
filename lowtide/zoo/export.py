"""What training leaves behind: a diffusers folder in fp16, its card, its loss curve and a grid of samples."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from lowtide.zoo.noise import device
from lowtide.zoo.trainer import Trainer

SHARD = "15MB"
ROW = 8
TABLE = 12


def export(trainer: Trainer, folder: Path) -> None:
    """The moving average as a folder. The samples come from the fp16 weights too: they show what ships."""
    pipe = trainer.task.pipeline(copy.deepcopy(trainer.average).eval())
    pipe.to(torch.float16).save_pretrained(folder, max_shard_size=SHARD)
    forget_origins(folder)
    pipe.to(device(), torch.float32)
    if isinstance(pipe, DiffusionPipeline):
        pipe.set_progress_bar_config(disable=True)
    sheet(trainer.task.samples(pipe)).save(folder / "samples.png")
    draw_losses(trainer.losses, folder / "loss.png")
    (folder / "README.md").write_text(card(trainer))


def forget_origins(folder: Path) -> None:
    """diffusers writes into a config where its parts were loaded from: a path of the machine that trained."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def sheet(images: np.ndarray) -> Image.Image:
    """All images as one, eight in a row, small ones enlarged without blur."""
    count, height, width, channels = images.shape
    rows = images.reshape(count // ROW, ROW, height, width, channels).transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(
        (rows.reshape(count // ROW * height, ROW * width, channels).squeeze() * 255).round().astype("uint8")
    )
    times = max(1, 512 // picture.width)
    return picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)


def draw_losses(losses: list[list[float]], path: Path) -> None:
    figure = Figure(figsize=(5, 2.6), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="#0b6e99")
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.locator_params(axis="x", nbins=6)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def loss_table(losses: list[list[float]]) -> str:
    """A dozen rows at most; the last is always the last loss."""
    every = max(1, -(-len(losses) // TABLE))
    rows = "\n".join(f"| {step} | {loss} |" for step, loss in losses[::-1][::every][::-1])
    return f"| step | loss |\n|---|---|\n{rows}\n" if losses else "No loss written down yet.\n"


def card(trainer: Trainer) -> str:
    spec, task = trainer.spec, trainer.task
    count = sum(p.numel() for p in trainer.average.parameters())
    legs = "\n".join(f"- {leg.describe()}" for leg in spec.legs if leg.until <= trainer.step or leg == trainer.leg)
    shown = f"{task.shown}\n\n" if task.shown else ""
    return (
        f"# zoo:{trainer.name}\n\nTrained by `python -m lowtide.zoo.train {trainer.name}` on {task.data}.\n"
        f"{count:,} parameters, {trainer.step} steps of {spec.batch} images, AdamW, moving average {spec.average}, "
        f"seed {spec.seed}, bf16 autocast, in legs:\n\n{legs}\n\n"
        f"![samples](samples.png)\n\n{shown}![loss over steps](loss.png)\n\n{loss_table(trainer.losses)}"
    )
