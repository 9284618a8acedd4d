"""The main path in numbers: `python bench/main_path.py` quantizes zoo:digits to W4A8.

It prints PSNR to the float model over same-seed samples, the error of the temporal features (summed
over timesteps and blocks), the size on disk, and the peak of anonymous memory while quantizing,
next to the bytes of the float model and of the largest block's data.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import lowtide
from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.evaluation.metrics import psnr
from lowtide.machine.peak_memory import Peak
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.stages.temporal_features import temporal_errors


def measure(method: str, settings: dict, request: sampling.Request, reference) -> dict:
    original = sampling.load_pipeline("zoo:digits")
    pipe = sampling.load_pipeline("zoo:digits")
    adapter = adapt(original.unet)
    started = time.perf_counter()
    with Peak() as peak:
        result = lowtide.quantize(pipe, method=method, **relevant_options(method, settings))
    minutes = (time.perf_counter() - started) / 60
    with tempfile.TemporaryDirectory() as folder:
        disk = facts.on_disk(result.save(Path(folder) / "packed"))
    errors = temporal_errors(adapter, original.unet, pipe.unet)
    account = result.report["account"]
    return {
        "method": method,
        "psnr": round(psnr(sampling.images(pipe, request), reference), 2),
        "temporal_error": round(errors.sum().item(), 4),
        "bytes_on_disk": disk,
        "ideal_bytes": facts.ideal_bytes(adapter, result.plan),
        "tables_and_scales": account["tables"] + account["scales"],
        "minutes": round(minutes, 2),
        "peak_bytes": peak.above,
        "float_bytes": facts.parameter_bytes(original.unet),
        "largest_block_bytes": result.report.get("largest_block_bytes", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--methods", default="minmax,tfmq")
    parser.add_argument("-w", "--weights", type=int, default=4)
    parser.add_argument("-a", "--inputs", type=int, default=8)
    parser.add_argument("--iters", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    request = sampling.Request(steps=options.steps, seeds=tuple(range(options.images)), batch=64)
    reference = sampling.images(sampling.load_pipeline("zoo:digits"), request)
    settings = {
        "weights": options.weights,
        "inputs": options.inputs,
        "steps": options.steps,
        "iters": options.iters,
    }
    for method in options.methods.split(","):
        print(json.dumps(measure(method, settings, request, reference)), flush=True)


if __name__ == "__main__":
    main()
