"""A LoRA on a packed pipeline: beside its layers, fused, unfused, saved, and before quantization.

What a layer with a LoRA has to answer is computed here from the LoRA's own tensors.
"""

import copy
import warnings
from itertools import pairwise

import lora_files
import pytest
import tiny
import tiny_pipelines
import torch
import torch.nn.functional as F
from fused_networks import ROUNDED_ALIKE, distance
from torch import nn

import lowtide
from lowtide import runtime
from lowtide.errors import BadInput
from lowtide.nn.feature_cache import ZeroFeatures
from lowtide.nn.float_layers import replace_module

pytest.importorskip("peft")

SCALE = lora_files.ALPHA / lora_files.RANK
# Of a fused LoRA and one beside the layers, relative L2: the scale is multiplied earlier.
FUSED_ALIKE = 2e-6


@pytest.fixture(scope="module")
def factors():
    return lora_files.random_lora(tiny.model("unet-text"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """Inputs in float, so that a program and its layers agree to the last digits."""
    pipe = tiny_pipelines.stable_diffusion(tmp_path_factory.mktemp("sd"))
    options = {"steps": 1, "images": 1, "size": 8, "prompts": ("a",), "inputs": 32}
    return lowtide.quantize(pipe, method="minmax", **options).pipe


@pytest.fixture
def pipe(quantized):
    """A copy for a test to change."""
    fresh = copy.copy(quantized)
    fresh.unet = copy.deepcopy(quantized.unet)
    fresh.register_modules(unet=fresh.unet)
    return fresh


def answer(unet: nn.Module, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 16, 32, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor(500), text, **options).sample


def plain_answer(unet: nn.Module, **options) -> torch.Tensor:
    with lowtide.unfused(unet):
        return answer(unet, **options)


def branch(layer: nn.Module, down: torch.Tensor, up: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    if down.dim() == 4:
        return F.conv2d(F.conv2d(x, down, None, layer.stride, layer.padding), up)
    return x @ down.T @ up.T


def watched(unet: nn.Module, factors) -> list[float]:
    """How far the answer of each layer is from that of its base layer plus that of the LoRA."""
    found: list[float] = []

    def check(down, up):
        def hook(module: nn.Module, args, output) -> None:
            base = module.base_layer
            expected = base(args[0]) + SCALE * branch(base, down, up, args[0])
            found.append(distance(output, expected))

        return hook

    hooks = [
        unet.get_submodule(name).register_forward_hook(check(*factors[name])) for name in factors
    ]
    plain_answer(unet)
    for hook in hooks:
        hook.remove()
    return found


def base_state(unet: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the model without those of adapters."""
    return {
        name.replace(".base_layer.", "."): tensor.clone()
        for name, tensor in unet.state_dict().items()
        if ".lora_" not in name
    }


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
def test_every_layout_runs_beside_packed_layers(layout, pipe, factors):
    lora_files.load(pipe, lora_files.LAYOUTS[layout](factors))
    found = watched(pipe.unet, factors)
    assert len(found) >= len(factors) > 40
    assert max(found) < 1e-6
    kinds = {type(pipe.unet.get_submodule(name).base_layer).__name__ for name in factors}
    assert kinds == {"PackedLinear", "PackedConv2d"}


def test_several_at_once_with_scales_switches_and_removal(pipe, factors):
    before = plain_answer(pipe.unet)
    lora_files.load(pipe, lora_files.peft_layout(factors), "one")
    one = plain_answer(pipe.unet)
    assert distance(one, before) > 0.05
    other_factors = lora_files.random_lora(tiny.model("unet-text"), lora_files.ATTENTION, seed=1)
    lora_files.load(pipe, lora_files.kohya_layout(other_factors), "two")
    answers = [one]
    for names, scales in [(["one", "two"], [0.5, 1.5]), (["two"], [1.0]), (["one"], [-1.0])]:
        pipe.set_adapters(names, scales)
        answers.append(plain_answer(pipe.unet))
    assert min(distance(a, b) for a, b in pairwise(answers)) > 0.01
    pipe.set_adapters(["one"], [1.0])
    assert torch.equal(plain_answer(pipe.unet), one)
    pipe.disable_lora()
    assert torch.equal(plain_answer(pipe.unet), before)
    pipe.enable_lora()
    pipe.delete_adapters("two")
    assert torch.equal(plain_answer(pipe.unet), one)
    pipe.unload_lora_weights()
    assert torch.equal(plain_answer(pipe.unet), before)


def test_a_program_runs_the_lora_and_follows_its_scale(pipe, factors):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        answer(pipe.unet)  # its program has no LoRA
        lora_files.load(pipe, lora_files.peft_layout(factors))
        for scale in (1.0, 0.25):
            options = {"cross_attention_kwargs": {"scale": scale}}
            found = answer(pipe.unet, **options)
            assert runtime.explain(pipe.unet)["native"] > 30
            assert distance(found, plain_answer(pipe.unet, **options)) < ROUNDED_ALIKE
        answers = [answer(pipe.unet)]
        pipe.set_adapters("style", 0.25)
        answers.append(answer(pipe.unet))
        assert distance(answers[1], found) < ROUNDED_ALIKE < distance(*answers)
        pipe.fuse_lora()
        assert distance(answer(pipe.unet), found) < ROUNDED_ALIKE


def test_torch_compile_sees_the_lora(pipe, factors):
    lora_files.load(pipe, lora_files.peft_layout(factors))
    layer = pipe.unet.down_blocks[0].resnets[0].conv1
    x = torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        beside = torch.compile(layer, backend="eager")(x)
        assert distance(beside, layer(x)) < 1e-6
        assert distance(beside, layer.base_layer(x)) > 0.05
        pipe.fuse_lora()
        torch._dynamo.reset()
        assert distance(torch.compile(layer.base_layer, backend="eager")(x), beside) < 1e-6


def test_fusing_computes_the_same_and_unfusing_brings_the_bytes_back(pipe, factors):
    before = base_state(pipe.unet)
    lora_files.load(pipe, lora_files.kohya_layout(factors), "one")
    lora_files.load(pipe, lora_files.peft_layout(factors), "two")
    pipe.set_adapters(["one", "two"], [0.7, -0.3])
    beside = plain_answer(pipe.unet)
    pipe.fuse_lora()
    assert 0 < distance(plain_answer(pipe.unet), beside) < FUSED_ALIKE
    assert base_state(pipe.unet).keys() > before.keys()
    assert pipe.fused_loras == {"one", "two"}
    pipe.unfuse_lora()
    assert same_state(base_state(pipe.unet), before)
    assert torch.equal(plain_answer(pipe.unet), beside)


def test_fusing_takes_a_scale_and_some_adapters(pipe, factors):
    lora_files.load(pipe, lora_files.kohya_layout(factors), "one")
    lora_files.load(pipe, lora_files.peft_layout(factors), "two")
    pipe.set_adapters(["one"], [0.5])
    beside = plain_answer(pipe.unet)
    pipe.set_adapters(["one", "two"])
    pipe.fuse_lora(lora_scale=0.5, adapter_names=["one"])
    assert distance(plain_answer(pipe.unet), beside) < FUSED_ALIKE
    branch_ = pipe.unet.down_blocks[0].resnets[0].conv1.base_layer.side
    assert len(branch_.down.weight) == lora_files.RANK


def test_a_fused_lora_is_saved_and_loaded(pipe, factors, tmp_path):
    lora_files.load(pipe, lora_files.peft_layout(factors))
    pipe.fuse_lora()
    expected = plain_answer(pipe.unet)
    lowtide.save(pipe, tmp_path / "fused")
    by_diffusers = type(pipe).from_pretrained(tmp_path / "fused")
    loaded = lowtide.load(tmp_path / "fused")
    for each in (by_diffusers, loaded):
        assert torch.equal(plain_answer(each.unet), expected)
    assert distance(answer(loaded.unet), expected) < ROUNDED_ALIKE
    assert not any("base_layer" in name for name in loaded.unet.state_dict())
    # Another one on top, and off again.
    before = base_state(loaded.unet)
    lora_files.load(loaded, lora_files.kohya_layout(factors), "more")
    beside = plain_answer(loaded.unet)
    loaded.fuse_lora()
    assert distance(plain_answer(loaded.unet), beside) < FUSED_ALIKE
    loaded.unfuse_lora()
    assert same_state(base_state(loaded.unet), before)


def test_a_lora_that_is_not_fused_stays_out_of_the_folder_in_one_line(pipe, factors, tmp_path):
    expected = plain_answer(pipe.unet)
    before = base_state(pipe.unet)
    lora_files.load(pipe, lora_files.peft_layout(factors), "style")
    with pytest.warns(UserWarning, match="without the LoRA style, which was loaded and not fused"):
        lowtide.save(pipe, tmp_path / "packed")
    loaded = lowtide.load(tmp_path / "packed")
    assert same_state(loaded.unet.state_dict(), before)
    assert torch.equal(plain_answer(loaded.unet), expected)


def test_a_dora_is_one_sentence_and_changes_nothing(pipe, factors):
    before = base_state(pipe.unet)
    expected = answer(pipe.unet)
    with pytest.raises(BadInput, match="found a DoRA on a packed model"):
        lora_files.load(pipe, lora_files.dora_layout(factors))
    assert same_state(base_state(pipe.unet), before)
    assert torch.equal(answer(pipe.unet), expected)
    lora_files.load(pipe, lora_files.peft_layout(factors))
    assert distance(answer(pipe.unet), expected) > 0.05


def test_a_lora_on_a_layer_that_became_a_table_is_one_sentence(pipe, factors):
    name = "down_blocks.0.resnets.0.time_emb_proj"
    replace_module(pipe.unet, name, ZeroFeatures(16))
    before = base_state(pipe.unet)
    with pytest.raises(BadInput, match=f"found a LoRA on {name}"):
        lora_files.load(pipe, lora_files.peft_layout(factors))
    assert same_state(base_state(pipe.unet), before)
    # One that does not touch the table works.
    others = lora_files.random_lora(tiny.model("unet-text"), lora_files.ATTENTION)
    lora_files.load(pipe, lora_files.peft_layout(others))
    assert max(watched(pipe.unet, others)) < 1e-6


def float_pipe(folder, factors):
    pipe = tiny_pipelines.stable_diffusion(folder)
    lora_files.load(pipe, lora_files.kohya_layout(factors), "style")
    return pipe


QUICK = {"method": "minmax", "steps": 1, "images": 1, "size": 8, "prompts": ("a",), "weights": 8}


def test_quantizing_a_model_with_a_lora_is_one_sentence(factors, tmp_path):
    pipe = float_pipe(tmp_path, factors)
    with pytest.raises(BadInput, match=r"found the LoRA style loaded in the unet.*fuse_lora=True"):
        lowtide.quantize(pipe, **QUICK)
    assert pipe.get_active_adapters() == ["style"]
    with pytest.raises(BadInput, match="found a LoRA in the unet, whose folder"):
        lowtide.save(pipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantizing_can_fuse_first(factors, tmp_path):
    pipe = float_pipe(tmp_path, factors)
    with_lora = answer(pipe.unet)
    pipe.disable_lora()
    without = answer(pipe.unet)
    pipe.enable_lora()
    result = lowtide.quantize(pipe, fuse_lora=True, **QUICK)
    assert not any("lora" in name or "base" in name for name in result.plan.layers)
    error = distance(plain_answer(result.model), with_lora)
    assert error < 0.25 * distance(without, with_lora)
    result.save(tmp_path / "packed")
    loaded = lowtide.load(tmp_path / "packed")
    assert torch.equal(plain_answer(loaded.unet), plain_answer(result.model))
