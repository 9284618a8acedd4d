"""Other libraries' variants of `lowtide bench speed`, with the Python that has them.

    python bench/speed_peers.py prepare VARIANT MODEL CALLS KEPT THREADS
    python bench/speed_peers.py run VARIANT MODEL CALLS KEPT THREADS

`prepare` converts the float model and keeps the result in KEPT; what is kept already stays. `run`
loads it, and nothing else, and takes steps as lowtide/workflows/speed_bench/channel.py orders them.
Static quantization calibrates on the calls, which is enough for a speed.
"""

import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowtide.workflows.speed_bench import calls as call_files
from lowtide.workflows.speed_bench.channel import Running, serve

OPSET = 18


@dataclass(frozen=True)
class Task:
    """One variant: the float model, its calls, where its conversion is kept, and the threads."""

    variant: str
    model: str
    calls: list[dict[str, Any]]
    kept: Path
    threads: int

    @property
    def names(self) -> list[str]:
        """The arguments that are arrays."""
        return [name for name, each in self.calls[0].items() if call_files.is_array(each)]

    @property
    def arrays(self) -> list[list[Any]]:
        """The array arguments of each call. A timestep is an array, as a graph needs it."""
        return [[np.atleast_1d(call[name]) for name in self.names] for call in self.calls]

    def place(self, name: str) -> Path:
        """Where a conversion is kept; another batch or size is another conversion."""
        shape = "x".join(map(str, self.arrays[0][0].shape))
        return self.kept / f"{name}-{shape}"


def network(task: Task) -> Any:
    """The denoiser as exporters need it: positional tensors in, one tensor out."""
    import torch

    from lowtide import sampling

    model = sampling.denoiser(sampling.load_pipeline(task.model)).eval().requires_grad_(False)
    plain = {
        name: each for name, each in task.calls[0].items() if not call_files.is_array(each)
    } | {"return_dict": False}

    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            given = dict(zip(task.names, values, strict=True)) | plain
            return self.model(**call_files.nested(given))[0]

    return Bare(), tuple(torch.from_numpy(each) for each in task.arrays[0])


def written(place: Path, write: Callable[[Path], Any]) -> Path:
    """Write into a folder that takes its place when it is complete; once."""
    if not place.exists():
        fresh = place.with_name(f"{place.name}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        fresh.rename(place)
    return place


# OpenVINO


def openvino_graph(task: Task) -> Any:
    import openvino as ov
    import torch

    bare, values = network(task)
    with torch.no_grad():
        graph = ov.convert_model(bare, example_input=values)
    ports = zip(graph.inputs, values, strict=True)
    graph.reshape({port: list(value.shape) for port, value in ports})
    return graph


def openvino_float(task: Task) -> Path:
    import openvino as ov

    def write(folder: Path) -> None:
        ov.save_model(openvino_graph(task), folder / "model.xml", compress_to_fp16=False)

    return written(task.place("openvino-fp32"), write)


def openvino_quantized(task: Task) -> Path:
    import nncf
    import openvino as ov

    def write(folder: Path) -> None:
        graph = ov.Core().read_model(openvino_float(task) / "model.xml")
        dataset = nncf.Dataset(task.arrays, lambda call: call)
        ov.save_model(
            nncf.quantize(graph, dataset, subset_size=len(task.calls)), folder / "model.xml"
        )

    return written(task.place("openvino-int8"), write)


def openvino_running(task: Task, place: Path) -> Running:
    import openvino as ov

    hint = "bf16" if task.variant.endswith("bf16") else "f32"
    wanted = {"INFERENCE_NUM_THREADS": task.threads, "INFERENCE_PRECISION_HINT": hint}
    # A stream, and no idle ones.
    wanted |= {"NUM_STREAMS": 1}
    request = ov.compile_model(place / "model.xml", "CPU", wanted).create_infer_request()
    return Running(lambda call: request.infer(task.arrays[call]))


# ONNX Runtime


def onnx_float(task: Task) -> Path:
    import torch

    def write(folder: Path) -> None:
        bare, values = network(task)
        names = [f"x{place}" for place in range(len(values))]
        with torch.no_grad():
            torch.onnx.export(
                bare,
                values,
                folder / "model.onnx",
                input_names=names,
                opset_version=OPSET,
                dynamo=False,
                external_data=True,
            )

    return written(task.place("onnxruntime-fp32"), write)


def onnx_quantized(task: Task) -> Path:
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [named(call) for call in task.arrays]

        def get_next(self) -> Any:
            return self.left.pop() if self.left else None

    def write(folder: Path) -> None:
        source = onnx_float(task) / "model.onnx"
        cleaned = folder / "cleaned.onnx"
        shape_inference.quant_pre_process(source, cleaned, skip_symbolic_shape=True)
        quantization.quantize_static(
            cleaned,
            folder / "model.onnx",
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            use_external_data_format=False,
        )
        cleaned.unlink()

    return written(task.place("onnxruntime-int8"), write)


def named(call: list[Any]) -> dict[str, Any]:
    return {f"x{place}": value for place, value in enumerate(call)}


def onnx_running(task: Task, place: Path) -> Running:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = task.threads
    options.inter_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(place / "model.onnx", options, providers=providers)
    inputs = {each.name for each in session.get_inputs()}
    calls = [
        {name: each for name, each in named(call).items() if name in inputs} for call in task.arrays
    ]
    return Running(lambda call: session.run(None, calls[call]))


@dataclass(frozen=True)
class Peer:
    """How a variant is converted, once, and how it is loaded."""

    convert: Callable[[Task], Path]
    run: Callable[[Task, Path], Running]


PEERS: Mapping[str, Peer] = {
    "openvino-fp32": Peer(openvino_float, openvino_running),
    "openvino-int8": Peer(openvino_quantized, openvino_running),
    "openvino-int8-bf16": Peer(openvino_quantized, openvino_running),
    "onnxruntime-fp32": Peer(onnx_float, onnx_running),
    "onnxruntime-int8": Peer(onnx_quantized, onnx_running),
}


def import_runtime(variant: str) -> None:
    """Import the library before its memory and its loading are measured."""
    if variant.startswith("openvino"):
        import openvino  # noqa: F401
    else:
        import onnxruntime  # noqa: F401


def main() -> None:
    what, variant, model, calls, kept, threads = sys.argv[1:]
    task = Task(variant, model, call_files.read(Path(calls)), Path(kept), int(threads))
    peer = PEERS[variant]
    if what == "prepare":
        peer.convert(task)
        return
    import_runtime(variant)
    serve(lambda: peer.run(task, peer.convert(task)))


if __name__ == "__main__":
    main()
