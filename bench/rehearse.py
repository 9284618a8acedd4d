"""Rehearse a quantization at full size: random weights, few images, few iterations.

    python bench/rehearse.py --out DIR [--models sdxl,sd15] [--dtype bfloat16] [--device cuda]
    python bench/rehearse.py --out DIR --models dit-xl-2 --layers 2 --size 16

Each model goes from float to packed, to disk, and back for one step, in a process of its own. What
is measured: peak memory (resident, and on the card), minutes by stage, bytes on disk. DIR keeps a
JSON for each model and one table of all; finished models are not run again without --fresh.

There are no text encoders: prompt embeddings are random numbers of the right shapes. So are the
sampler's inputs, at the timesteps that a sampler would take. Figures of quality mean nothing here.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from gpu import networks
from torch import nn

from lowtide import sampling
from lowtide.checkpoint import diffusers_hook, facts
from lowtide.machine import devices, peak_memory
from lowtide.methods import recipe_of, relevant_options
from lowtide.models import adapt
from lowtide.models.trace import mapped
from lowtide.nn.plan import with_summary
from lowtide.sampling import ModulePipeline
from lowtide.settings import Settings, settings_from
from lowtide.stages.base import Call, Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.placing import on_the_device
from lowtide.workflows.method_ranks import lined

Json = dict[str, Any]
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
TRAINED_STEPS = 1000
GUIDED = 2  # samples of a call that belong to one image


def built(options: argparse.Namespace) -> nn.Module:
    """The float denoiser on the CPU."""
    kind = networks.KINDS[options.one][0]
    changes: Json = {"sample_size": options.size} if options.size else {}
    is_unet = issubclass(kind, UNet2DConditionModel)
    if options.layers:
        changes["layers_per_block" if is_unet else "num_layers"] = options.layers
    dtype = DTYPES[options.dtype]
    return networks.network(options.one, devices.CPU, dtype, tiny=options.tiny, **changes)


def settings_of(options: argparse.Namespace) -> Settings:
    """What the run is asked for; each sample of a guided call counts as an image."""
    values = {name: getattr(options, name) for name in OPTIONS if name != "iters"}
    values |= {"images": GUIDED * options.images, "calibration_steps": options.steps}
    values |= {"weights": options.weights, "inputs": options.inputs, "iters": options.iters}
    return settings_from(relevant_options(options.method, values))


def calls_of(model: nn.Module, settings: Settings) -> list[Call]:
    """Random inputs at every step of a schedule."""
    gap = TRAINED_STEPS // settings.steps
    samples = settings.calibration_batch
    calls: list[Call] = []
    for _ in range(settings.images // samples):
        first = networks.inputs_of(model, samples)
        changing = next(iter(first))
        for step in range(settings.steps):
            time = TRAINED_STEPS - 1 - step * gap
            changes = {
                changing: torch.randn_like(first[changing]),
                "timestep": torch.full((samples,), time),
            }
            calls.append(Call(time, first | changes, kept=True))
    return calls


def packed(options: argparse.Namespace, model: nn.Module, device: torch.device) -> Job:
    """Quantize the model in place, as `lowtide.quantize` does after it has drawn images."""
    settings = settings_of(options)
    recipe = recipe_of(options.method, settings, options.without)
    calls = calls_of(model, settings)
    adapter = adapt(model, calls[0].arguments)
    pipe = ModulePipeline(model, DDIMScheduler(), shape=())  # nothing draws with it
    job = Job(pipe, model, adapter, settings, options.method, calls=calls)
    stages = tuple(stage for stage in recipe if not isinstance(stage, Collect))
    with on_the_device(job, recipe, device, named=True):
        run_recipe(stages, job)
    diffusers_hook.attach(model, with_summary(job.plan, settings))
    return job


def rehearsed(options: argparse.Namespace) -> Json:
    """One model from float to packed, saved, loaded and run for one step."""
    started = time.perf_counter()
    device = devices.chosen(options.device)
    folder = options.out / options.one
    with peak_memory.Peak() as peak:
        torch.manual_seed(0)
        model = built(options)
        kind = type(model)
        count = sum(parameter.numel() for parameter in model.parameters())
        float_bytes = facts.parameter_bytes(model)
        timestep = torch.full((GUIDED,), TRAINED_STEPS - 1)
        inputs = networks.inputs_of(model, GUIDED) | {"timestep": timestep}
        inputs = mapped(inputs, lambda x: x.to(device) if isinstance(x, torch.Tensor) else x)
        report = packed(options, model, device).report
        on_card = card_peak(device)
        cast(Any, model).save_pretrained(folder)
        del model
        step = one_step(kind, folder, inputs, DTYPES[options.dtype])
    return {
        "model": options.one,
        "method": options.method,
        "bits": f"W{options.weights}A{options.inputs}",
        "dtype": options.dtype,
        "device": devices.describe(device),
        "cut": {"layers": options.layers, "size": options.size, "tiny": options.tiny},
        "settings": {name: getattr(options, name) for name in (*OPTIONS, "without")},
        "parameters": count,
        "float_bytes": float_bytes,
        "on_disk": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "peak_bytes": peak.above,
        "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "card_bytes": on_card,
        "minutes": round((time.perf_counter() - started) / 60, 2),
        "seconds": report["seconds"],
        "placed": report["place"],
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        **step,
    }


def card_peak(device: torch.device) -> int | None:
    """The most bytes that torch has allocated on a CUDA card."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def one_step(kind: Any, folder: Path, inputs: Json, dtype: torch.dtype) -> Json:
    """Load the packed denoiser, and call it for one guided image on the inputs' device."""
    device = inputs["timestep"].device
    started = time.perf_counter()
    with sampling.quiet_libraries():
        model = kind.from_pretrained(folder, torch_dtype=dtype).to(device).eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        answer = model(**inputs)[0]
    devices.synchronize(device)
    if not answer.isfinite().all():
        raise ValueError("found NaN or infinity in the packed model's answer")
    ended = time.perf_counter()
    return {"load_seconds": round(loaded - started, 1), "step_seconds": round(ended - loaded, 2)}


OPTIONS = ("images", "steps", "iters", "batch", "place")
HEAD = [
    "model", "weights", "device", "peak of a process", "on the card", "float", "on disk",
    "minutes", "one step",
]  # fmt: skip


def row(result: Json) -> list[str]:
    """A line of the table."""
    if "failed" in result:
        return [result["model"], "", "", f"failed: {result['failed']}", "", "", "", "", ""]
    cut = ", ".join(f"{name} {value}" for name, value in result["cut"].items() if value)
    what = f"{result['model']} {result['bits']} {result['method']}"
    millions = f"{result['parameters'] / 1e6:.0f} M, {result['dtype']}"
    card = "" if result["card_bytes"] is None else gigabytes(result["card_bytes"])
    return [
        f"{what} ({cut})" if cut else what,
        millions,
        result["device"],
        gigabytes(result["resident_bytes"]),
        card,
        gigabytes(result["float_bytes"]),
        gigabytes(result["on_disk"]),
        f"{result['minutes']:.1f}",
        f"{result['step_seconds']:.1f} s",
    ]


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


def run_alone(name: str, options: argparse.Namespace) -> Json:
    """One model in a process of its own; a result that is kept is not made again."""
    path = options.out / f"{name}.json"
    if path.exists() and not options.fresh:
        kept = json.loads(path.read_text())
        if "failed" not in kept:
            return kept
    command = [sys.executable, __file__, *sys.argv[1:], "--one", name]
    ended = subprocess.run(command)
    if not path.exists() or ended.returncode:
        failed = {"model": name, "failed": f"its process ended with {ended.returncode}"}
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(failed | known, indent=1) + "\n")
    return json.loads(path.read_text())


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", default=",".join(networks.KINDS))
    parser.add_argument("--method", default="tfmq")
    parser.add_argument(
        "--without", action="append", default=[], help="a stage to leave out, such as tiar"
    )
    parser.add_argument("--weights", type=int, default=4)
    parser.add_argument("--inputs", type=int, default=8)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--place", choices=("auto", "whole", "blocks"), default="auto")
    parser.add_argument("--size", type=int, help="height and width of the latents")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    parser.add_argument("--images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--iters", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the script")
    parser.add_argument("--fresh", action="store_true", help="run finished models again")
    parser.add_argument("--one", choices=networks.KINDS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.one:
        path = options.out / f"{options.one}.json"
        path.unlink(missing_ok=True)
        try:
            result = rehearsed(options)
        except Exception as error:
            traceback.print_exc()
            result = {"model": options.one, "failed": f"{type(error).__name__}: {error}"[:300]}
        path.write_text(json.dumps(result, indent=1) + "\n")
        sys.exit("failed" in result)
    results = [run_alone(name, options) for name in options.models.split(",")]
    table = "\n".join(lined([HEAD, ["---"] * len(HEAD), *map(row, results)]))
    (options.out / "table.md").write_text(table + "\n")
    print(table)
    sys.exit(any("failed" in result for result in results))


if __name__ == "__main__":
    main()
