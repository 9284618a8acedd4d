"""Adapters of peft that are no LoRA: refused on packed layers, fused into a float model before."""

import copy

import pytest
import tiny_pipelines
import torch
from fused_networks import distance

import lowtide
from lowtide.errors import BadInput
from lowtide.nn.swap import packed_layers

peft = pytest.importorskip("peft")

OPTIONS = {"method": "minmax", "steps": 1, "images": 1, "size": 8, "prompts": ("a",), "inputs": 32}
TARGETS = ["to_q", "to_k", "conv1", "proj_in"]
KINDS = ("LoKr", "LoHa")


def config(kind):
    torch.manual_seed(0)
    made = getattr(peft, f"{kind}Config")
    return made(r=3, alpha=6, target_modules=TARGETS, init_weights=False)


@pytest.fixture(scope="module")
def floating(tmp_path_factory):
    return tiny_pipelines.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def packed(floating):
    return lowtide.quantize(copy.deepcopy(floating), **OPTIONS).pipe


@torch.no_grad()
def answer(unet):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 16, 32, generator=generator)
    return unet(sample, torch.tensor(500), text).sample


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_refused_on_packed_layers(kind, packed):
    before = answer(packed.unet)
    with pytest.raises(BadInput, match=f"found a {kind} on a packed model.*fuse_lora=True"):
        packed.unet.add_adapter(config(kind), "style")
    assert torch.equal(answer(packed.unet), before)
    state = packed.unet.state_dict()
    assert not any("base_layer" in name for name in state)


def test_a_file_of_lokr_is_refused_too(packed):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"transformer.{layer}.lokr_w1": torch.ones(4, 4)}
    width = packed.unet.get_submodule(layer).out_features
    state[f"transformer.{layer}.lokr_w2"] = torch.ones(width // 4, width // 4)
    with pytest.raises(BadInput, match="found a LoKr on a packed model"):
        packed.unet.load_lora_adapter(state, prefix="transformer")


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_fused_before_a_quantization(kind, floating):
    pipe = copy.deepcopy(floating)
    pipe.unet.add_adapter(config(kind), "style")
    expected = answer(pipe.unet)
    assert distance(expected, answer(floating.unet)) > 0.01
    with pytest.raises(BadInput, match="found the LoRA style loaded in the unet"):
        lowtide.quantize(pipe, **OPTIONS)
    unet = lowtide.quantize(pipe, fuse_lora=True, **OPTIONS | {"weights": 8}).model
    assert any(packed_layers(unet))
    assert distance(answer(unet), expected) < 0.02
