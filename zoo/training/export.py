"""What training leaves: a diffusers folder in fp16, its card, its loss curve, a grid of samples."""

import copy
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from lowtide import zoo
from training.batches import device
from training.trainer import Trainer

SHARD_SIZE = "15MB"
IMAGES_PER_ROW = 8
TABLE_ROWS = 12
CARD = """\
# zoo:{name}

Trained by `python zoo/train.py {name}` on {data}.
{parameters:,} parameters, {steps} steps of {batch} images, AdamW, moving average {average}, \
seed {seed}, bf16 autocast, in phases:

{phases}

![samples](samples.png)

{shown}![loss over steps](loss.png)

{losses}"""


def model_folder(name: str) -> Path:
    """Where the export puts a model: the package for the ones that ship, else the repository."""
    return (zoo.PACKAGE if name in zoo.SHIPPED else zoo.REPOSITORY) / name


def export(trainer: Trainer, folder: Path) -> None:
    """Write the moving average as a folder, in fp16.

    The samples are drawn with the same fp16 weights, so they show what ships.
    """
    pipe = trainer.task.pipeline(copy.deepcopy(trainer.average).eval())
    pipe.to(torch.float16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
    remove_origins(folder)
    pipe.to(device(), torch.float32)
    if isinstance(pipe, DiffusionPipeline):
        pipe.set_progress_bar_config(disable=True)
    image_grid(trainer.task.samples(pipe)).save(folder / "samples.png")
    draw_losses(trainer.losses, folder / "loss.png")
    (folder / "README.md").write_text(card(trainer))


def remove_origins(folder: Path) -> None:
    """Remove from each config the path that diffusers loaded the part from: a local path."""
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2) + "\n")


def image_grid(images: np.ndarray) -> Image.Image:
    """All images as one picture, eight in a row; small ones are enlarged without blur.

    images: (count, height, width, channels), 0 to 1.
    """
    count, height, width, channels = images.shape
    rows = count // IMAGES_PER_ROW
    grid = images.reshape(rows, IMAGES_PER_ROW, height, width, channels).transpose(0, 2, 1, 3, 4)
    pixels = grid.reshape(rows * height, IMAGES_PER_ROW * width, channels).squeeze()
    picture = Image.fromarray((pixels * 255).round().astype("uint8"))
    factor = max(1, 512 // picture.width)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


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
    """At most twelve rows; the last row is always the last loss."""
    if not losses:
        return "No loss recorded yet.\n"
    stride = -(-len(losses) // TABLE_ROWS)
    rows = "\n".join(f"| {step} | {loss} |" for step, loss in losses[::-1][::stride][::-1])
    return f"| step | loss |\n|---|---|\n{rows}\n"


def card(trainer: Trainer) -> str:
    """The model's README: data, settings, phases, pictures and losses."""
    model = trainer.zoo_model
    task = trainer.task
    step = trainer.step
    phases = [phase for phase in model.phases if phase.until <= step or phase == trainer.phase]
    return CARD.format(
        name=trainer.name,
        data=task.data,
        parameters=sum(parameter.numel() for parameter in trainer.average.parameters()),
        steps=step,
        batch=model.batch,
        average=model.average,
        seed=model.seed,
        phases="\n".join(f"- {phase.describe()}" for phase in phases),
        shown=f"{task.shown}\n\n" if task.shown else "",
        losses=loss_table(trainer.losses),
    )
