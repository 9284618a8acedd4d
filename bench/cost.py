"""What learning the rounding costs: `python bench/cost.py [--million 10] [--batch 16] [--whole]`.

For each unit of a random UNet, it times one AdaRound iteration as it really runs (with bf16
products where they are faster). Next to it, it times the unit's own forward and backward pass in
float32 on the same batch. The two take turns; medians count. From these, and from a short run of
all other stages, it estimates the minutes of tfmq at W4A8. With --whole it estimates nothing: tfmq
runs from the float model to the packed file, and its minutes are printed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import UNet2DModel

import lowtide
from lowtide import sampling
from lowtide.machine.bf16 import describe_products
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.rounding import RoundingOptimizer
from lowtide.nn.swap import set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.reconstruct import PENALTY, Learner, rate, sharpness
from lowtide.stages.stream import Stream, UnitData
from lowtide.stages.tiar import TIAR

REPEATS = 15
# Widths of a three-level UNet, by its millions of parameters.
WIDTHS = {1: (32, 64, 64), 10: (96, 192, 192)}
SETTINGS = Settings(weights=4, inputs=8, steps=10, images=8, calibration_steps=5, iters=2000)


def model(million: int) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=32,
        block_out_channels=WIDTHS[million],
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=32,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def count(float_model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in float_model.parameters())


def started(million: int, settings: Settings) -> Job:
    pipe = sampling.as_pipeline(model(million))
    job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "cost")
    run_recipe((Collect(), Assign(per_step=True), FitWeights("mse")), job)
    return job


def costs(job: Job, scene: UnitData) -> dict[str, float]:
    """Median seconds of an iteration, and of a float forward and backward pass to the weights."""
    learner = Learner(job, "cost", scene.unit, job.settings.iters)
    generator = job.generator("cost", scene.unit.name)
    module = job.model.get_submodule(scene.unit.name)
    weights = [layer.weight for layer in learner.layers.values()]
    starts = [layer.start_rounding() for layer in learner.layers.values()]
    roundings = RoundingOptimizer(starts, rate(job.settings.iters))

    def iteration() -> None:
        set_precision(module, Precision.WEIGHTS)
        learner.iterate(lambda: scene.loss(generator), roundings, PENALTY, sharpness(0.5))

    def floating() -> None:
        set_precision(module, Precision.FLOAT)
        for weight in weights:
            weight.requires_grad_(True).grad = None
        with float_weights(learner):
            scene.loss(generator).backward()

    seconds = taking_turns(iteration, floating)
    for weight in weights:
        weight.requires_grad_(False).grad = None
    for layer in learner.layers.values():
        layer.set_codes(layer.codes)
    return {"unit": scene.unit.name, "iteration": seconds[0], "float": seconds[1]}


@contextmanager
def float_weights(learner: Learner) -> Iterator[None]:
    """Layers compute with their float weight itself, so that it gets a gradient, as in training."""
    for layer in learner.layers.values():
        layer.effective_weight = lambda layer=layer: layer.weight
    yield
    for layer in learner.layers.values():
        del layer.effective_weight


def taking_turns(*acts: Callable[[], None]) -> list[float]:
    """Median seconds of each."""
    seconds: list[list[float]] = [[] for _ in acts]
    for _ in range(REPEATS):
        for act, times in zip(acts, seconds, strict=True):
            before = time.perf_counter()
            act()
            times.append(time.perf_counter() - before)
    return [statistics.median(times) for times in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--million", type=int, choices=sorted(WIDTHS), default=10)
    parser.add_argument(
        "--batch", type=int, default=SETTINGS.batch, help="samples an iteration learns from"
    )
    parser.add_argument("--whole", action="store_true", help="run all of it")
    options = parser.parse_args()
    run = whole if options.whole else estimated
    run(options.million, replace(SETTINGS, batch=options.batch))


def whole(million: int, settings: Settings) -> None:
    float_model = model(million)
    parameters = count(float_model)
    with TemporaryDirectory() as folder:
        began = time.perf_counter()
        result = lowtide.quantize(
            float_model, method="tfmq", folder=Path(folder) / "units", **vars(settings)
        )
        result.save(Path(folder) / "packed")
        minutes = (time.perf_counter() - began) / 60
    summary = {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "minutes": round(minutes, 1),
    }
    print(json.dumps(summary))


def estimated(million: int, settings: Settings) -> None:
    began = time.perf_counter()
    job = started(million, settings)
    parameters = count(job.model)
    prepared = time.perf_counter() - began
    rows = [costs(job, scene) for scene in Stream(job).walk()]
    began = time.perf_counter()
    TIAR().run(replace(job, settings=replace(job.settings, iters=20)))
    temporal = (time.perf_counter() - began) * job.settings.iters / 20
    learning = sum(row["iteration"] for row in rows)
    floating = sum(row["float"] for row in rows)
    minutes = (job.settings.iters * learning + temporal + prepared) / 60
    for row in rows:
        milliseconds = [f"{1e3 * row[name]:8.1f} ms" for name in ("iteration", "float")]
        print(
            f"{row['unit']:<40} {'  '.join(milliseconds)}  {row['iteration'] / row['float']:.2f}x"
        )
    summary = {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "learnt_with": describe_products(next(job.model.parameters())),
        "batch": settings.batch,
        "iteration_to_float": round(learning / floating, 3),
        "largest": round(max(row["iteration"] / row["float"] for row in rows), 2),
        "minutes_of_2000_iterations": round(minutes, 1),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
