"""Exports to float load in plain diffusers; ComfyUI's file follows the rules of its loader."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import UNet2DModel
from exported_models import packed
from safetensors.torch import load_file

import lowtide
from lowtide.errors import BadInput
from lowtide.exporting import to_comfyui, to_float
from lowtide.exporting.trial_calls import answers_of, example_calls, relative_error
from lowtide.nn.dequantize import dequantize_modules
from lowtide.nn.side_branch import Factors, side_branch
from lowtide.nn.swap import packed_layers
from lowtide.runtime import plain
from lowtide.workflows.compvis.names import UNetLayout


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    return packed("best", tmp_path_factory.mktemp("best"))


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    return packed("text-minmax", tmp_path_factory.mktemp("sd"))


def test_a_float_folder_loads_without_lowtide(best, tmp_path):
    exported = lowtide.export(best, tmp_path / "out", to="float")
    code = (
        "import sys, torch; from diffusers import DDIMPipeline; "
        f"pipe = DDIMPipeline.from_pretrained({str(exported.folder)!r}); "
        "assert type(pipe.unet.conv_in) is torch.nn.Conv2d; assert 'lowtide' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    loaded = UNet2DModel.from_pretrained(exported.folder / "unet")
    calls = example_calls(best.model, best.plan)
    with plain(best.model):
        expected = answers_of(best.model, calls)
    error = relative_error(answers_of(loaded, calls), expected)
    assert error == pytest.approx(exported.error, rel=1e-3)
    assert error < 0.1
    assert [line.split()[0] for line in exported.lost] == ["Inputs", "The", "Features", "The"]
    assert json.loads((exported.folder / "lowtide-export.json").read_text())["to"] == "float"


def test_rounded_weights_are_the_codes_values(conditional):
    """The float twin has the weights of the packed layers, with divisors folded in."""
    twin = to_float.float_twin(conditional.model, conditional.plan)
    for name, layer in packed_layers(conditional.model):
        x = torch.randn(2, *[8] * (layer.weight_dimensions - 2), layer.channels)
        x = x.movedim(-1, 1) if layer.weight_dimensions == 4 else x
        enabled = layer.input.enabled
        layer.input.enabled = False
        with torch.no_grad(), plain(conditional.model):
            expected = layer(x)
            found = twin.get_submodule(name)(x)
        layer.input.enabled = enabled
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_one_schedule_takes_layers_from_the_float_model(tmp_path):
    only = packed("best", tmp_path, only_schedule=True)
    with pytest.raises(BadInput, match="--reference"):
        to_float.float_twin(only.model, only.plan)
    reference = tiny.model("unet2d")
    twin = to_float.float_twin(only.model, only.plan, reference)
    calls = example_calls(only.model, only.plan)
    error = relative_error(answers_of(twin, calls), answers_of(only.model, calls))
    assert error < 0.1


def test_a_fused_lora_is_added_to_the_weight(tmp_path):
    quantized = packed("static", tmp_path)
    name, layer = next(iter(packed_layers(quantized.model)))
    down = torch.randn(2, layer.channels, *layer.kernel_size)
    factors = Factors(
        down, torch.randn(layer.out_channels, 2, 1, 1), torch.randn(layer.out_channels)
    )
    layer.side = side_branch(layer, factors)
    layer.input.enabled = False
    x = torch.randn(2, layer.channels, 8, 8)
    with torch.no_grad(), plain(quantized.model):
        expected = layer(x)
        dequantize_modules(quantized.model, quantized.plan, torch.float32)
        found = quantized.model.get_submodule(name)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_comfyui_reads_every_layer_by_its_rules(conditional, tmp_path):
    """Rules of ComfyUI's loader: Comfy-Org/ComfyUI, comfy/ops.py, _load_quantized_module."""
    exported = lowtide.export(conditional, tmp_path / "out", to="comfyui")
    state = load_file(exported.folder / to_comfyui.FILE)
    twin = to_float.float_twin(conditional.model, conditional.plan)
    markers = [name for name in state if name.endswith(".comfy_quant")]
    linears = {name for name, each in twin.named_modules() if type(each) is torch.nn.Linear}
    packed_names = {name for name, _ in packed_layers(conditional.model)}
    assert len(markers) == len(linears & packed_names) > 10
    layout = UNetLayout(1, (True, False), transformer=True)
    values = {}
    for theirs, tensor in state.items():
        layer, _, kind = theirs.rpartition(".")
        if kind in ("comfy_quant", "weight_scale"):
            continue
        [name] = layout.names(theirs)
        values[name] = tensor.float()
        if f"{layer}.comfy_quant" in state and kind == "weight":
            assert json.loads(state[f"{layer}.comfy_quant"].numpy().tobytes()) == to_comfyui.FORMAT
            assert tensor.dtype == torch.int8
            assert state[f"{layer}.weight_scale"].shape == (len(tensor), 1)
            values[name] = tensor.float() * state[f"{layer}.weight_scale"]
    expected = twin.state_dict()
    assert values.keys() == expected.keys()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-2, atol=2e-3)
    # Without the rounding of attention, float is as far; int8 adds little to that.
    calls = example_calls(conditional.model, conditional.plan)
    with plain(conditional.model):
        packed_answers = answers_of(conditional.model, calls)
    assert exported.error < 1.5 * relative_error(answers_of(twin, calls), packed_answers) + 0.01


def test_comfyui_has_no_unet_without_a_text(best, tmp_path):
    with pytest.raises(BadInput, match="UNet2DConditionModel"):
        lowtide.export(best, tmp_path / "out", to="comfyui")
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_no_checkpoint(best, tmp_path):
    best.save(tmp_path / "model")
    with pytest.raises(BadInput, match="another kind"):
        lowtide.export(best, tmp_path / "model", to="float")
    lowtide.export(best, tmp_path / "out", to="float")
    lowtide.export(best, tmp_path / "out", to="float")
