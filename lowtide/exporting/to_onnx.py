"""ONNX: QuantizeLinear and DequantizeLinear before each layer, weights as 4-bit or 8-bit integers.

torch writes the graph with the two operators of operators.py as they are, and this file then puts
ONNX's own in their place. The file has the layout of optimum: `unet/model.onnx`, with the weights
beside it in `model.onnx_data`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.onnx.symbolic_helper import parse_args  # pyright: ignore

from lowtide.exporting.packages import needed
from lowtide.exporting.traceable import TracedDenoiser
from lowtide.exporting.traced_operators import NAMESPACE, ROUND, STORED

FILE = "model.onnx"
WEIGHTS = "model.onnx_data"
FILES = (FILE, WEIGHTS)
ANSWER = "out_sample"
TRACED_OPSET = 18  # of torch's exporter
OPSET = 21  # the first with integers of 4 bits
LEAST_BYTES = 1024  # of a tensor that is written beside the graph


def write(denoiser: TracedDenoiser, values: Sequence[Tensor], folder: Path) -> None:
    """Write the graph of a traceable denoiser. Its batch is free, all other axes are as here."""
    onnx = needed("onnx")
    path = folder / FILE
    axes = {name: {0: "batch"} for name in denoiser.batched}
    with _kept_operators(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            denoiser,
            tuple(values),
            path,
            input_names=list(denoiser.names),
            output_names=[ANSWER],
            dynamic_axes=axes | {ANSWER: {0: "batch"}},
            opset_version=TRACED_OPSET,
            custom_opsets={NAMESPACE: 1},
            do_constant_folding=False,
            external_data=True,
            dynamo=False,
        )
    model = onnx.load(path)
    for written in folder.iterdir():
        if written.name != "config.json":
            written.unlink()
    _in_own_operators(model)
    onnx.save(
        model,
        path,
        save_as_external_data=True,
        location=WEIGHTS,
        size_threshold=LEAST_BYTES,
    )


@contextmanager
def _kept_operators() -> Iterator[None]:
    """Within the context, torch's exporter leaves our two operators as they are."""
    symbols: Sequence[tuple[str, Callable[..., Any], int]] = (
        (f"{NAMESPACE}::{ROUND}", _rounded, 1),
        (f"{NAMESPACE}::{STORED}", _stored, 1),
        ("aten::exp2", _power_of_two, TRACED_OPSET),
        ("aten::rms_norm", _root_mean_square_norm, TRACED_OPSET),
    )
    # torch does not declare the two as exports.
    register = torch.onnx.register_custom_op_symbolic  # pyright: ignore
    unregister = torch.onnx.unregister_custom_op_symbolic  # pyright: ignore
    for name, symbol, opset in symbols:
        register(name, symbol, opset)
    try:
        yield
    finally:
        for name, _, opset in symbols:
            unregister(name, opset)


def _power_of_two(graph: Any, x: Any) -> Any:
    """Which torch's exporter does not convert; the grids of log2 formats have it."""
    return graph.op("Pow", graph.op("Constant", value_t=torch.tensor(2.0)), x)


@parse_args("v", "is", "v", "f")
def _root_mean_square_norm(
    graph: Any, x: Any, shape: Sequence[int], weight: Any, epsilon: float | None
) -> Any:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last axes; ONNX has it from opset 23 on."""
    least = torch.finfo(torch.float32).eps if epsilon is None else epsilon
    axes = graph.op("Constant", value_t=torch.arange(-len(shape), 0))
    mean = graph.op("ReduceMean", graph.op("Mul", x, x), axes, keepdims_i=1)
    above = graph.op("Add", mean, graph.op("Constant", value_t=torch.tensor(least)))
    root = graph.op("Sqrt", above)
    normed = graph.op("Div", x, root)
    return normed if weight.node().mustBeNone() else graph.op("Mul", normed, weight)


@parse_args("v", "v", "v", "i")
def _rounded(graph: Any, x: Any, scale: Any, zero: Any, top: int) -> Any:
    code = graph.op(f"{NAMESPACE}::{ROUND}", x, scale, zero, top_i=top)
    return code.setType(x.type())


@parse_args("v", "v", "v", "v", "i")
def _stored(graph: Any, reader: Any, codes: Any, zero: Any, scale: Any, bits: int) -> Any:
    values = graph.op(f"{NAMESPACE}::{STORED}", codes, zero, scale, bits_i=bits)
    return values.setType(codes.type().with_dtype(torch.float32))


def _in_own_operators(model: Any) -> None:
    """Replace our operators by ONNX's, in place."""
    onnx = needed("onnx")
    graph = model.graph
    constants = {node.output[0]: node for node in graph.node if node.op_type == "Constant"}
    nodes: list[Any] = []
    for node in graph.node:
        if node.domain != NAMESPACE:
            nodes.append(node)
        elif node.op_type == ROUND:
            nodes += _quantize_and_back(node)
        else:
            arrays = [_array(constants[name]) for name in node.input]
            tensors, dequantize = _dequantize(node, *arrays)
            graph.initializer.extend(tensors)
            nodes.append(dequantize)
    used = set(chain.from_iterable(node.input for node in nodes))
    kept = [node for node in nodes if node.op_type != "Constant" or node.output[0] in used]
    del graph.node[:]
    graph.node.extend(kept)
    del model.opset_import[:]
    model.opset_import.append(onnx.helper.make_opsetid("", OPSET))
    onnx.checker.check_model(model)


def _array(constant: Any) -> np.ndarray:
    return needed("onnx").numpy_helper.to_array(constant.attribute[0].t)


def _attribute(node: Any, name: str) -> int:
    return next(each.i for each in node.attribute if each.name == name)


def _quantize_and_back(node: Any) -> list[Any]:
    """Codes have 8 bits here, and a grid of fewer bits clips them before: uint8 is what runs."""
    onnx = needed("onnx")
    x, scale, zero = node.input
    answer = node.output[0]
    codes = f"{answer}_codes"
    top = _attribute(node, "top")
    nodes = [onnx.helper.make_node("QuantizeLinear", [x, scale, zero], [codes])]
    if top < 255:
        clipped = f"{answer}_clipped"
        last = f"{answer}_top"
        value = onnx.numpy_helper.from_array(np.uint8(top))
        nodes.append(onnx.helper.make_node("Constant", [], [last], value=value))
        nodes.append(onnx.helper.make_node("Min", [codes, last], [clipped]))
        codes = clipped
    nodes.append(onnx.helper.make_node("DequantizeLinear", [codes, scale, zero], [answer]))
    return nodes


def _dequantize(
    node: Any, codes: np.ndarray, zero: np.ndarray, scale: np.ndarray
) -> tuple[list[Any], Any]:
    """The tensors of a weight, and the node that decodes them with one scale for each row."""
    onnx = needed("onnx")
    answer = node.output[0]
    kinds = onnx.TensorProto
    wide, narrow = (
        (kinds.INT8, kinds.INT4) if codes.dtype == np.int8 else (kinds.UINT8, kinds.UINT4)
    )
    kind = narrow if _attribute(node, "bits") == 4 else wide
    names = [f"{answer}_codes", f"{answer}_scale"]
    tensors = [
        _integers(names[0], codes, kind),
        onnx.numpy_helper.from_array(scale.reshape(-1), names[1]),
    ]
    if zero.ndim:
        names.append(f"{answer}_zero")
        tensors.append(_integers(names[2], zero.reshape(-1), kind))
    return tensors, onnx.helper.make_node("DequantizeLinear", names, [answer], axis=0)


def _integers(name: str, values: np.ndarray, kind: int) -> Any:
    """A tensor of integers; of 4 bits, the first of two lies in the lower half of a byte."""
    onnx = needed("onnx")
    flat = values.reshape(-1)
    if kind in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        low = flat.view(np.uint8) & 15
        pairs = np.pad(low, (0, len(low) % 2)).reshape(-1, 2)
        flat = pairs[:, 0] | (pairs[:, 1] << 4)
    return onnx.helper.make_tensor(name, kind, values.shape, flat.tobytes(), raw=True)


def answers(folder: Path, calls: Sequence[Mapping[str, np.ndarray]]) -> list[np.ndarray]:
    """What ONNX Runtime computes for these calls on the CPU."""
    onnxruntime = needed("onnxruntime")
    session = onnxruntime.InferenceSession(folder / FILE, providers=["CPUExecutionProvider"])
    taken = {each.name for each in session.get_inputs()}
    return [
        session.run(None, {name: each for name, each in call.items() if name in taken})[0]
        for call in calls
    ]
