"""Exports to OpenVINO and ONNX Runtime compute what packed layers compute, at their bits."""

import numpy as np
import onnx
import openvino
import pytest
import torch
from exported_models import denoiser_folder, other_calls, packed

import lowtide
from lowtide.errors import BadInput
from lowtide.exporting import packages, to_onnx, to_openvino
from lowtide.exporting.trial_calls import answers_of, arrays, relative_error
from lowtide.nn.packed import PackedConv2d
from lowtide.nn.swap import packed_layers

RUNTIMES = {"openvino": to_openvino, "onnx": to_onnx}
# A rounding that flips costs a step of 8 bits, and deeper layers see it. How far that goes is what
# lowtide's own program differs from its layers; a graph may be three times as far.
BOUND = 0.02
SHARE = 3
SLOW = pytest.mark.slow
# Conversions to OpenVINO take most of the time.
PAIRS = [
    ("static", "openvino"),
    ("static", "onnx"),
    ("steps", "openvino"),
    ("steps", "onnx"),
    ("best", "onnx"),
    pytest.param("best", "openvino", marks=SLOW),
    pytest.param("text", "openvino", marks=SLOW),
    pytest.param("text", "onnx", marks=SLOW),
    pytest.param("dit", "openvino", marks=SLOW),
    pytest.param("dit", "onnx", marks=SLOW),
    ("sdxl", "onnx"),
    ("pixart", "onnx"),
    ("sd3", "onnx"),
    ("flux", "onnx"),
    pytest.param("sdxl", "openvino", marks=SLOW),
    pytest.param("pixart", "openvino", marks=SLOW),
    pytest.param("sd3", "openvino", marks=SLOW),
    pytest.param("flux", "openvino", marks=SLOW),
]


class Models(dict):
    """Packed models by kind, made when a test asks for them."""

    def __init__(self, folder):
        self.folder = folder

    def __missing__(self, kind):
        self[kind] = packed(kind, self.folder)
        return self[kind]


class Exports(dict):
    """Exports by kind of model and target, made when a test asks for them."""

    def __init__(self, models, folder):
        self.models = models
        self.folder = folder

    def __missing__(self, key):
        kind, to = key
        self[key] = lowtide.export(self.models[kind], self.folder / f"{kind}-{to}", to=to)
        return self[key]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def exports(models, tmp_path_factory):
    return Exports(models, tmp_path_factory.mktemp("exports"))


@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_another_batch_of_other_inputs_gets_the_packed_answers(models, exports, kind, to):
    exported = exports[kind, to]
    calls, expected = other_calls(models[kind])
    place = denoiser_folder(exported, models[kind])
    found = RUNTIMES[to].answers(place, [arrays(call) for call in calls])
    noise = relative_error(answers_of(models[kind].model, calls), expected)
    bound = max(BOUND, SHARE * noise)
    assert relative_error([torch.from_numpy(each) for each in found], expected) < bound
    assert exported.error < bound


@pytest.mark.parametrize("to", ["onnx", pytest.param("openvino", marks=SLOW)])
def test_the_step_changes_the_answer(models, exports, to):
    """A graph that always took the ranges and features of one step would be far off."""
    calls, _ = other_calls(models["best"])
    first, last = arrays(calls[0]), arrays(calls[-1])
    swapped = last | {"timestep": first["timestep"]}
    place = denoiser_folder(exports["best", to], models["best"])
    one, other = RUNTIMES[to].answers(place, [last, swapped])
    assert np.linalg.norm(one - other) > 5 * BOUND * np.linalg.norm(one)


@pytest.mark.parametrize("to", RUNTIMES)
def test_an_unknown_timestep_gives_nan_and_the_loss_is_named(models, exports, to):
    call = arrays(other_calls(models["steps"])[0][0])
    call["timestep"] = call["timestep"] + 7
    exported = exports["steps", to]
    [answer] = RUNTIMES[to].answers(denoiser_folder(exported, models["steps"]), [call])
    assert np.isnan(answer).all()
    assert any("NaN" in line for line in exported.lost)


def test_openvino_holds_our_codes_at_their_bits(models, exports):
    model = models["steps"].model
    place = denoiser_folder(exports["steps", "openvino"], models["steps"])
    graph = openvino.Core().read_model(place / to_openvino.FILE)
    constants = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Constant"]
    small = (openvino.Type.u4, openvino.Type.i4)
    held = sum(np.prod(node.get_shape()) for node in constants if node.get_element_type() in small)
    layers = [layer for _, layer in packed_layers(model)]
    four = [layer for layer in layers if layer.format.bits == 4]
    assert len(four) > 10
    assert held >= sum(layer.rows_and_columns().numel() for layer in four)
    # No weight of a packed layer is there as floats.
    largest = max(
        np.prod(node.get_shape())
        for node in constants
        if node.get_element_type() == openvino.Type.f32
    )
    assert largest < max(layer.rows_and_columns().numel() for layer in layers)


def test_openvino_rounds_what_every_convolution_reads(models, exports):
    """Convolutions are counted: other layers that read one tensor by one range share a node."""
    place = denoiser_folder(exports["static", "openvino"], models["static"])
    graph = openvino.Core().read_model(place / to_openvino.FILE)
    nodes = [node for node in graph.get_ordered_ops() if node.get_type_name() == "Convolution"]
    plans = models["static"].plan.layers
    layers = packed_layers(models["static"].model)
    convolutions = [name for name, layer in layers if isinstance(layer, PackedConv2d)]
    rounded = [name for name in convolutions if plans[name].input is not None]
    sources = [node.input_value(0).get_node().get_type_name() for node in nodes]
    assert len(sources) == len(convolutions)
    assert sources.count("FakeQuantize") == len(rounded) > 10


def test_onnx_holds_integers_of_four_bits(models, exports):
    place = denoiser_folder(exports["steps", "onnx"], models["steps"])
    graph = onnx.load(place / to_onnx.FILE)
    onnx.checker.check_model(graph)
    four = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    held = [tensor for tensor in graph.graph.initializer if tensor.data_type in four]
    assert sum(np.prod(tensor.dims) for tensor in held) > 10_000
    assert all(len(each.raw_data) == -(-np.prod(each.dims) // 2) for each in held)


def test_the_model_is_as_before(models, exports):
    """Tracing puts modules and products in place for a while; the program runs again afterwards."""
    quantized = models["best"]
    assert exports["best", "onnx"].folder.is_dir()
    assert not any(layer.product for _, layer in packed_layers(quantized.model))
    images = quantized.pipe(num_inference_steps=2, output_type="np").images
    assert np.isfinite(images).all()
    assert quantized.model._forward_pre_hooks


def test_the_folder_is_that_of_optimum(models, exports):
    folder = exports["steps", "openvino"].folder
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {"model_index.json", "unet/openvino_model.xml", "unet/openvino_model.bin"} <= names
    assert {"unet/config.json", "scheduler/scheduler_config.json"} <= names
    assert not any(name.endswith(".safetensors") and name.startswith("unet") for name in names)
    assert "quantization_config" not in (folder / "unet" / "config.json").read_text()


def test_a_missing_package_is_one_sentence():
    with pytest.raises(BadInput, match="pip install nothing_of_this_name"):
        packages.needed("nothing_of_this_name.opset")


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match="no model that lowtide packed"):
        lowtide.export("zoo:digits", tmp_path / "out", to="onnx")
    with pytest.raises(BadInput, match="the target 'tensorrt'"):
        lowtide.export("zoo:digits", tmp_path / "out", to="tensorrt")
    assert not (tmp_path / "out").exists()
