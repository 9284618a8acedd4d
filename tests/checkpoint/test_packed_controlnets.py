"""A ControlNet that is packed while diffusers loads it, saved, loaded, beside a packed UNet."""

import copy

import more_pipelines
import pytest
import torch
from diffusers import (
    ControlNetModel,
    PipelineQuantizationConfig,
    StableDiffusionControlNetPipeline,
)

import lowtide
from lowtide import LowtideConfig
from lowtide.nn.swap import packed_layers

OPTIONS = {"method": "minmax", "steps": 2, "images": 2, "size": 16, "prompts": ("a b", "c d")}


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    """The folder of a float pipeline with a ControlNet."""
    place = tmp_path_factory.mktemp("control")
    pipe = more_pipelines.control_net(place)
    pipe.save_pretrained(place / "float")
    return place / "float"


@pytest.fixture(scope="module")
def control(floating):
    kept = ["conv_in", "controlnet_cond_embedding"]
    config = LowtideConfig(weights=8, inputs=8, modules_to_not_convert=kept)
    return ControlNetModel.from_pretrained(floating / "controlnet", quantization_config=config)


@pytest.fixture(scope="module")
def packed(floating, control):
    """A pipeline whose UNet is calibrated with the controls of the packed ControlNet."""
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        floating, controlnet=copy.deepcopy(control)
    )
    call = {"image": more_pipelines.picture()}
    return lowtide.quantize(pipe, call=call, **OPTIONS)


@torch.no_grad()
def answers(model):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 32, generator=generator)
    image = torch.rand(2, 3, 16, 16, generator=generator)
    down, middle = model(sample, 10, text, image, return_dict=False)
    return [*down, middle]


def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "generator": noise, "output_type": "np"}
    return pipe("a b", more_pipelines.picture(), height=16, width=16, **options).images


def test_its_answers_are_near_the_float_model(floating, control):
    expected = answers(ControlNetModel.from_pretrained(floating / "controlnet"))
    found = answers(control)
    names = dict(packed_layers(control))
    assert len(names) > 20
    assert not any(name.startswith(("conv_in", "controlnet_cond_embedding")) for name in names)
    for one, other in zip(found, expected, strict=True):
        assert 0 < (one - other).norm() / other.norm() < 0.05


def test_it_is_saved_and_loaded(control, tmp_path):
    control.save_pretrained(tmp_path / "packed")
    again = ControlNetModel.from_pretrained(tmp_path / "packed")
    assert {layer.format.bits for layer in dict(packed_layers(again)).values()} == {8}
    for one, other in zip(answers(again), answers(control), strict=True):
        assert torch.equal(one, other)


def test_a_pipeline_of_a_packed_unet_and_a_packed_control_net(packed, tmp_path):
    assert any(packed_layers(packed.pipe.controlnet))
    expected = draw(packed.pipe)
    again = lowtide.load(packed.save(tmp_path / "both"))
    assert any(packed_layers(again.unet))
    assert any(packed_layers(again.controlnet))
    assert abs(draw(again) - expected).max() == 0


def test_both_are_packed_while_the_pipeline_loads(floating):
    config = LowtideConfig(weights=8, inputs=8)
    parts = PipelineQuantizationConfig(quant_mapping={"unet": config, "controlnet": config})
    pipe = StableDiffusionControlNetPipeline.from_pretrained(floating, quantization_config=parts)
    assert any(packed_layers(pipe.unet))
    assert any(packed_layers(pipe.controlnet))
    plain = StableDiffusionControlNetPipeline.from_pretrained(floating)
    assert 0 < abs(draw(pipe) - draw(plain)).mean() < 0.05
