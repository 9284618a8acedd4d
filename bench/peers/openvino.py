"""NNCF and OpenVINO: quantization with calibration data at 8 bits, weight compression below."""

from dataclasses import replace
from typing import Any

import nncf
import openvino as ov
import torch
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters

from lowtide import sampling
from peers.task import FLOAT, Bare, Bits, Held, Packed, Recipe, Served, Task, Unable

PACKAGES = ("nncf", "openvino")
GROUP = 32
PRODUCTS = {"Convolution", "GroupConvolution", "MatMul"}
WIDTHS = {
    "i8": 8,
    "u8": 8,
    "i4": 4,
    "u4": 4,
    "nf4": 4,
    "u3": 3,
    "u2": 2,
    "i2": 2,
    "i3": 3,
    "boolean": 1,
    "u1": 1,
}
MODES = nncf.CompressWeightsMode
BELOW_EIGHT = {4: MODES.INT4_ASYM, 3: MODES.INT3_SYM, 2: MODES.INT2_SYM}


def exported(task: Task) -> Any:
    """The denoiser as an OpenVINO graph for one batch size."""
    values = tuple(task.calls[0].values())
    with torch.no_grad():
        graph = ov.convert_model(Bare(task.model, task.calls[0]), example_input=values)
    ports = zip(graph.inputs, values, strict=True)
    graph.reshape({port: list(value.shape) for port, value in ports})
    return graph


def data(task: Task) -> nncf.Dataset:
    return nncf.Dataset(task.calls, lambda call: tuple(value.numpy() for value in call.values()))


def compiled(task: Task, graph: Any, group: int) -> Any:
    """One thread and float32 between the layers, as for every peer.

    `group` > 0 lets OpenVINO round the inputs of linears as it runs.
    """
    wanted = {
        "INFERENCE_NUM_THREADS": 1,
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": group,
    }
    network = ov.compile_model(graph, "CPU", wanted)
    return lambda *values: torch.from_numpy(network([value.numpy() for value in values])[0].copy())


def finish(task: Task, graph: Any) -> Packed:
    plain = compiled(task, graph, 0)
    chosen = compiled(task, graph, GROUP) if task.bits.inputs == 8 else plain
    call = tuple(task.calls[len(task.calls) // 2].values())
    dynamic = task.bits.inputs == 8 and not torch.equal(chosen(*call), plain(*call))
    task.replace(Served(task.model, task.calls[0], chosen))
    layers = held(graph)
    if dynamic:
        layers = {
            name: replace(layer, inputs=8) if name in linears(graph) else layer
            for name, layer in layers.items()
        }
    note = "linears' inputs: rounded as it runs" if dynamic else ""
    return Packed(
        sampling.denoiser(task.pipe),
        layers,
        lambda folder: ov.save_model(graph, folder / "model.xml"),
        note,
    )


def linears(graph: Any) -> set[str]:
    """What its dynamic quantization may apply to."""
    nodes = graph.get_ordered_ops()
    return {module_name(node) for node in nodes if node.get_type_name() == "MatMul"}


def held(graph: Any) -> dict[str, Held]:
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() in PRODUCTS]
    layers = {
        module_name(node): Held(stored(node, 1), 8 if rounded(node) else FLOAT) for node in products
    }
    return {name: layer for name, layer in layers.items() if layer.weights < 16}


def module_name(node: Any) -> str:
    return node.get_friendly_name().split("/")[0].removeprefix("__module.").removeprefix("model.")


def rounded(node: Any) -> bool:
    return node.input_value(0).get_node().get_type_name() == "FakeQuantize"


def stored(node: Any, place: int) -> int:
    """The bits of the constant that a weight is unfolded from."""
    source = node.input_value(place).get_node()
    while source.get_type_name() != "Constant":
        if not source.get_input_size():
            return FLOAT
        source = source.input_value(0).get_node()
    return WIDTHS.get(source.get_element_type().get_type_name(), FLOAT)


def check_eight(bits: Bits) -> None:
    if bits.quantized_inputs and bits.inputs != 8:
        raise Unable(f"activations are 8 bits, not {bits.inputs}")


def ptq(task: Task, **options: Any) -> Packed:
    """nncf.quantize: every layer at W8A8, ranges from the calibration calls."""
    check_eight(task.bits)
    options |= {"subset_size": len(task.calls)}
    return finish(task, nncf.quantize(exported(task), data(task), **options))


def transformer(task: Task) -> Packed:
    advanced = AdvancedQuantizationParameters(disable_bias_correction=True)
    return ptq(task, model_type=nncf.ModelType.TRANSFORMER, advanced_parameters=advanced)


def compress(task: Task) -> Packed:
    """nncf.compress_weights: linears below 8 bits by error, convolutions always at 8 bits."""
    check_eight(task.bits)
    if task.bits.weights == 8:
        return finish(task, nncf.compress_weights(exported(task), mode=MODES.INT8_ASYM))
    if task.bits.weights not in BELOW_EIGHT:
        raise Unable(f"no {task.bits.weights}-bit mode")
    low = {
        "mode": BELOW_EIGHT[task.bits.weights],
        "ratio": 1.0,
        "group_size": GROUP,
        "all_layers": True,
    }
    smart = {"dataset": data(task), "scale_estimation": task.bits.weights == 4, "subset_size": 128}
    return finish(task, nncf.compress_weights(exported(task), **low, **smart))


RECIPES = {
    "PTQ": Recipe(ptq, lambda bits: bits == Bits(8, 8)),
    "PTQ, transformer": Recipe(transformer, lambda bits: bits == Bits(8, 8)),
    "compressed weights": Recipe(compress, lambda bits: bits != Bits(8, 8)),
}
