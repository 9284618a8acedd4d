"""What people switch on attention of a packed model: the rounding stays, or a sentence says why."""

import copy

import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import AutoPipelineForText2Image, ControlNetModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.nn.attention import QuantAttention
from lowtide.nn.packed import PackedConv2d

OPTIONS = {"method": "minmax", "steps": 2, "images": 2}


@pytest.fixture(scope="module")
def packed():
    return lowtide.quantize(sampling.as_pipeline(tiny.model("unet2d")), **OPTIONS)


def answer(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randn(1, 3, 8, 8), 0)[0]


class OwnProcessor(AttnProcessor2_0):
    """A processor of somebody else, which doubles what attention answers."""

    def __call__(self, attn, *args, **kwargs):
        """In the end scaled_dot_product_attention runs."""
        return 2 * super().__call__(attn, *args, **kwargs)


def switch(model, processor):
    """What `set_attn_processor` of diffusers' larger models does."""
    for module in model.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(processor)


def rounded(model):
    processors = [getattr(module, "processor", None) for module in model.modules()]
    return sum(isinstance(each, QuantAttention) and each.active for each in processors)


def test_another_processor_is_rounded_too(packed):
    model = copy.deepcopy(packed.model)
    expected = answer(model)
    count = rounded(model)
    assert count > 1
    switch(model, AttnProcessor2_0())
    assert rounded(model) == count
    with lowtide.unfused(model):
        plain = answer(model)
    assert (plain - expected).norm() < 1e-5 * expected.norm()
    with pytest.warns(UserWarning, match="its modules were changed"):
        assert torch.equal(answer(model), plain)
    switch(model, OwnProcessor())
    assert rounded(model) == count
    assert (answer(model) - expected).norm() > 0.01 * expected.norm()
    assert (answer(packed.model) - expected).norm() == 0


def test_a_new_processor_before_the_first_call(packed):
    model = copy.deepcopy(packed.model)
    switch(model, AttnProcessor2_0())
    assert torch.equal(answer(model), answer(packed.model))


@pytest.mark.parametrize("how", ["slice", "processor"])
def test_a_processor_of_its_own_products_is_refused(packed, how):
    model = copy.deepcopy(packed.model)
    count = rounded(model)
    with pytest.raises(BadInput, match=r"multiplies q, k and v by itself; .* leave attention sl"):
        if how == "slice":
            blocks = [each for each in model.modules() if hasattr(each, "set_attention_slice")]
            blocks[0].set_attention_slice(1)
        else:
            switch(model, AttnProcessor())
    assert rounded(model) == count


def test_slicing_of_a_pipeline(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    lowtide.quantize(pipe, prompts=["a cat"], **OPTIONS)
    with pytest.raises(BadInput, match="leave attention slicing off"):
        pipe.enable_attention_slicing()
    with pytest.raises(BadInput, match="found fuse_qkv_projections on a packed model"):
        pipe.unet.fuse_qkv_projections()
    with pytest.raises(BadInput, match="found fuse_qkv_projections on a packed model"):
        pipe.fuse_qkv_projections(vae=False)


def test_a_control_net_starts_from_a_packed_unet(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    lowtide.quantize(pipe, prompts=["a cat"], **OPTIONS)
    control = ControlNetModel.from_unet(pipe.unet)
    plain = copy.deepcopy(pipe.unet).dequantize()
    assert torch.equal(control.conv_in.weight, plain.conv_in.weight)
    assert isinstance(pipe.unet.conv_in, PackedConv2d)
    assert torch.equal(ControlNetModel.from_unet(plain).conv_in.weight, plain.conv_in.weight)


def test_perturbed_attention_guidance_where_attention_is_in_float(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    lowtide.quantize(pipe, prompts=["a cat"], keep_float=["attn1"], **OPTIONS)
    guided = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    guided.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}
    images = [
        guided("a", pag_scale=scale, generator=torch.manual_seed(0), **options).images
        for scale in (0.0, 3.0)
    ]
    assert abs(images[0] - images[1]).max() > 1e-4


def test_perturbed_attention_guidance_where_attention_is_rounded(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    lowtide.quantize(pipe, prompts=["a cat"], **OPTIONS)
    count = rounded(pipe.unet)
    before = dict(pipe.unet.named_modules())
    guided = AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True, pag_applied_layers=["mid"])
    guided.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np"}
    running = []
    hook = pipe.unet.register_forward_pre_hook(lambda *_: running.append(rounded(pipe.unet)))
    images = [
        guided("a", pag_scale=scale, generator=torch.manual_seed(0), **options).images
        for scale in (0.0, 3.0)
    ]
    hook.remove()
    assert set(running) == {count}
    assert abs(images[0] - images[1]).max() > 1e-4
    assert dict(pipe.unet.named_modules()) == before


def test_attention_in_float_takes_what_it_is_given():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    model = lowtide.quantize(pipe, keep_float=["attentions"], **OPTIONS).model
    expected = answer(model)
    switch(model, AttnProcessor())
    assert (answer(model) - expected).norm() < 1e-4 * expected.norm()
