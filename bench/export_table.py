"""The table of exports: size, error and CPU time of a step, against the packed checkpoint.

    python bench/export_table.py RUN FLOAT [REPEATS]

Every target is written beside RUN. One thread; each row is the median CPU time of a call of two
images, all variants in turns. `error` is what `lowtide export` measures.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch

import lowtide
from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.exporting import to_onnx, to_openvino
from lowtide.exporting.trial_calls import answers_of, arrays, example_calls, relative_error
from lowtide.runtime import plain

Step = Callable[[dict[str, Any]], object]


def openvino_step(folder: Path) -> Step:
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0  # else OpenVINO rounds inputs by itself
    compiled = openvino.compile_model(folder / to_openvino.FILE, "CPU", settings)
    return lambda call: compiled(arrays(call))


def onnx_step(folder: Path) -> Step:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        folder / to_onnx.FILE, options, providers=["CPUExecutionProvider"]
    )
    return lambda call: session.run(None, arrays(call))


def torch_step(model: Any) -> Step:
    return lambda call: answers_of(model, [call])


def main() -> None:
    run, floating, *rest = sys.argv[1:]
    repeats = int(rest[0]) if rest else 12
    torch.set_num_threads(1)
    packed = sampling.denoiser(lowtide.load(run, device="cpu"))
    calls = example_calls(packed, facts.packed_plan(packed))
    with plain(packed):
        expected = answers_of(packed, calls)
    float_model = sampling.denoiser(lowtide.load(floating, device="cpu"))
    steps: dict[str, Step] = {"float": torch_step(float_model), "packed": torch_step(packed)}
    sizes = {"float": facts.parameter_bytes(float_model), "packed": facts.parameter_bytes(packed)}
    errors = {
        "float": relative_error(answers_of(float_model, calls), expected),
        "packed": relative_error(answers_of(packed, calls), expected),
    }
    for target in ("float", "openvino", "onnx", "comfyui"):
        try:
            folder = Path(f"{run}-{target}")
            exported = lowtide.export(run, folder, to=target)
        except BadInput as error:
            print(f"{target}: {error}", file=sys.stderr)
            continue
        name = f"--to {target}"
        sizes[name] = exported.weight_bytes
        errors[name] = exported.error
        place = folder / sampling.denoiser_name(lowtide.load(run, device="cpu"))
        if target == "openvino":
            steps[name] = openvino_step(place)
        if target == "onnx":
            steps[name] = onnx_step(place)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            step(calls[turn % len(calls)])
            if turn > 1:
                seconds[name].append(time.process_time() - start)
    print("| | MB | error | CPU ms a step |\n| --- | --- | --- | --- |")
    for name, size in sizes.items():
        taken = f"{1000 * statistics.median(seconds[name]):.1f}" if name in seconds else ""
        print(f"| {name} | {size / 1e6:.2f} | {errors[name]:.1e} | {taken} |")
    assert np.isfinite(list(errors.values())).all()


if __name__ == "__main__":
    main()
