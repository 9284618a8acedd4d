"""OpenVINO: weights as constants of 4 or 8 bits, FakeQuantize with our ranges before each layer.

The file has the layout of optimum-intel: `unet/openvino_model.xml` beside the `.bin` of its
weights. A range for each step is looked up by a Gather in a table, as are temporal features.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowtide.exporting.packages import needed
from lowtide.exporting.traceable import TracedDenoiser
from lowtide.exporting.traced_operators import NAMESPACE, ROUND, STORED

FILE = "openvino_model.xml"
WEIGHTS = "openvino_model.bin"
FILES = (FILE, WEIGHTS)
ANSWER = "out_sample"


def write(denoiser: TracedDenoiser, values: Sequence[Tensor], folder: Path) -> None:
    """Write the graph of a traceable denoiser. Its batch is free, all other axes are as here."""
    openvino = needed("openvino")
    extension = needed("openvino.frontend.pytorch").ConversionExtension
    converters = [
        extension(f"{NAMESPACE}::{ROUND}", _rounded),
        extension(f"{NAMESPACE}::{STORED}", _stored),
        extension("aten::exp2", _power_of_two),
    ]
    with torch.no_grad(), warnings.catch_warnings():
        # The tracer warns of every condition on a shape.
        warnings.simplefilter("ignore")
        graph = openvino.convert_model(denoiser, example_input=tuple(values), extension=converters)
    shapes: dict[Any, Any] = {}
    for port, name, value in zip(graph.inputs, denoiser.names, values, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        first = -1 if name in denoiser.batched else value.shape[0]
        shapes[port] = openvino.PartialShape([first, *value.shape[1:]])
    graph.outputs[0].get_tensor().set_names({ANSWER})
    graph.reshape(shapes)
    openvino.save_model(graph, folder / FILE, compress_to_fp16=False)


def _rounded(context: Any) -> Any:
    """FakeQuantize: the values of the grid are those from -zero to top - zero, times the scale."""
    op = needed("openvino.opset15")
    x, scale, zero = (context.get_input(place) for place in range(3))
    top = context.get_values_from_const_input(3)
    zero = op.convert(zero, "f32")
    low = op.multiply(op.negative(zero), scale)
    high = op.multiply(op.subtract(op.constant(np.float32(top)), zero), scale)
    return op.fake_quantize(x, low, high, low, high, top + 1).outputs()


def _stored(context: Any) -> Any:
    """Convert, Subtract, Multiply: the form in which OpenVINO knows weights of few bits."""
    op = needed("openvino.opset15")
    codes, zero, scale = (_array(context, place) for place in range(1, 4))
    bits = context.get_values_from_const_input(4)
    values = op.convert(_constant(codes, bits), "f32")
    if zero.ndim:
        values = op.subtract(values, op.convert(_constant(zero, bits), "f32"))
    return op.multiply(values, op.constant(scale)).outputs()


def _power_of_two(context: Any) -> Any:
    """Which OpenVINO does not convert by itself; the grids of log2 formats have it."""
    op = needed("openvino.opset15")
    return op.power(op.constant(np.float32(2)), context.get_input(0)).outputs()


def _array(context: Any, place: int) -> np.ndarray:
    return np.ascontiguousarray(context.get_input(place).get_node().data)


def _constant(codes: np.ndarray, bits: int) -> Any:
    """The codes as a constant of their kind; of 4-bit codes, the first lies in the lower half."""
    op = needed("openvino.opset15")
    if bits == 8:
        return op.constant(codes)
    openvino = needed("openvino")
    kind = openvino.Type.i4 if codes.dtype == np.int8 else openvino.Type.u4
    flat = codes.reshape(-1).view(np.uint8) & 15
    pairs = np.pad(flat, (0, len(flat) % 2)).reshape(-1, 2)
    # A tensor that OpenVINO allocates: one around an array would not keep the array alive.
    tensor = openvino.Tensor(kind, list(codes.shape))
    tensor.data.reshape(-1).view(np.uint8)[:] = pairs[:, 0] | (pairs[:, 1] << 4)
    return op.constant(tensor)


def answers(folder: Path, calls: Sequence[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """What OpenVINO computes for these calls on the CPU, in float32."""
    openvino = needed("openvino")
    # By itself, OpenVINO rounds the inputs of 4-bit layers once more, to ranges of its own.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.compile_model(folder / FILE, "CPU", settings)
    return [compiled(call)[0] for call in calls]
