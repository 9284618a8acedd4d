"""Profiles: every part of a network gets the bits that the released code of each paper gives it."""

import pytest
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.methods import (
    METHODS,
    PAPER_PROFILES,
    recipe_of,
    relevant_options,
    with_profile,
)
from lowtide.models import adapt
from lowtide.settings import Settings
from lowtide.stages.profiles import PROFILES, Bits, parts_of_layers

FAST = {"steps": 2, "images": 2, "iters": 1, "calibration_steps": 1}
FLOAT = 32
# Bits of weights and inputs in an LDM's UNet at W4A6, as read in each released code.
EXPECTED = {
    "full": {
        "conv_in": (8, FLOAT),
        "conv_out": (8, FLOAT),
        "time_embedding.linear_1": (4, 6),
        "down_blocks.1.resnets.0.conv_shortcut": (4, 6),
        "down_blocks.0.downsamplers.0.conv": (4, 6),
        "down_blocks.1.attentions.0.to_q": (4, 6),
        "down_blocks.0.resnets.0.conv1": (4, 6),
    },
    "tfmq": {
        "conv_in": (FLOAT, FLOAT),
        "conv_out": (FLOAT, FLOAT),
        "time_embedding.linear_1": (FLOAT, FLOAT),
        "time_embedding.linear_2": (4, FLOAT),
        "down_blocks.0.resnets.0.time_emb_proj": (4, 6),
        "down_blocks.1.resnets.0.conv_shortcut": (FLOAT, FLOAT),
        "down_blocks.0.downsamplers.0.conv": (FLOAT, FLOAT),
        "down_blocks.1.attentions.0.to_q": (FLOAT, FLOAT),
        "mid_block.attentions.0.to_out.0": (FLOAT, FLOAT),
        "down_blocks.0.resnets.0.conv1": (4, FLOAT),
        "down_blocks.0.resnets.0.conv2": (4, 6),
    },
    "qdiffusion": {
        "conv_in": (4, 6),
        "conv_out": (4, 6),
        "time_embedding.linear_1": (4, 6),
        "down_blocks.1.resnets.0.conv_shortcut": (4, 6),
        "down_blocks.1.attentions.0.to_q": (4, 6),
    },
    "ptq4dm": {
        "conv_in": (4, FLOAT),
        "conv_out": (8, 8),
        "time_embedding.linear_1": (8, FLOAT),
        "time_embedding.linear_2": (4, 6),
        "down_blocks.1.resnets.0.conv_shortcut": (4, 6),
        "down_blocks.1.attentions.0.to_q": (FLOAT, FLOAT),
    },
    "ptqd": {
        "conv_in": (8, 8),
        "conv_out": (8, FLOAT),
        "time_embedding.linear_1": (8, 8),
        "time_embedding.linear_2": (4, 6),
        "down_blocks.1.resnets.0.conv_shortcut": (FLOAT, FLOAT),
        "down_blocks.1.attentions.0.to_q": (FLOAT, FLOAT),
    },
    "efficientdm": {
        "conv_in": (8, 8),
        "conv_out": (8, 8),
        "time_embedding.linear_1": (8, 8),
        "time_embedding.linear_2": (8, 8),
        "down_blocks.0.resnets.0.time_emb_proj": (4, 6),
        "down_blocks.0.downsamplers.0.conv": (FLOAT, FLOAT),
        "down_blocks.1.attentions.0.to_q": (FLOAT, FLOAT),
    },
}
EXPECTED["mpq"] = EXPECTED["efficientdm"]
# q, k, v and softmax at W4A6.
ATTENTION = {
    "full": (6, 6),
    "qdiffusion": (6, 8),
    "tfmq": None,
    "ptq4dm": None,
    "ptqd": None,
    "efficientdm": None,
    "mpq": None,
}


def bits(plan, name: str) -> tuple[int, int]:
    layer = plan.layers.get(name)
    weight = layer.weight.bits if layer and layer.weight else FLOAT
    return weight, layer.input.bits if layer and layer.input else FLOAT


def packed(pipe, **options):
    """Quantized with as little work as the method takes."""
    method = options.pop("method", "minmax")
    wanted = {"weights": 4, "inputs": 6} | relevant_options(method, FAST) | options
    return lowtide.quantize(pipe, method=method, **wanted)


@pytest.mark.parametrize("profile", PROFILES)
def test_each_part_has_the_bits_of_the_released_code(profile, tmp_path):
    plan = packed(tiny_pipelines.ldm(tmp_path), profile=profile).plan
    expected = EXPECTED[profile]
    assert {name: bits(plan, name) for name in expected} == expected
    parts = list(plan.attentions.values())
    if ATTENTION[profile] is None:
        assert not parts and "attention" in plan.left
    else:
        found = [tuple(part[name].input.bits for name in ("q", "v", "softmax")) for part in parts]
        q, softmax = ATTENTION[profile]
        assert len(found) > 1 and set(found) == {(q, q, softmax)}
    assert plan.summary["profile"] == profile


@pytest.mark.parametrize("profile", ["tfmq", "efficientdm"])
def test_attention_is_conv1d_only_where_the_released_code_has_it_so(profile, tmp_path):
    """DDIM's own UNet has 2-D convolutions there, Stable Diffusion linear layers."""
    name = "down_blocks.1.attentions.0.to_q"
    assert bits(packed(tiny_pipelines.ddim(tmp_path), profile=profile).plan, name) == (4, 6)
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    plan = packed(pipe, profile=profile, prompts=("a",), size=16).plan
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    assert bits(plan, name) == (4, 6)
    assert "profile" not in plan.left.get(name, "")


def test_the_softmax_of_stable_diffusion_has_sixteen_bits_in_qdiffusion(tmp_path):
    pipe = tiny_pipelines.stable_diffusion(tmp_path)
    plan = packed(pipe, profile="qdiffusion", inputs=8, prompts=("a",), size=16).plan
    assert plan.attentions
    for part in plan.attentions.values():
        assert part["q"].input.bits == 8 and part["softmax"].input is None


def test_paper_is_the_profile_of_the_methods_own_paper():
    found = {name: with_profile(name, Settings(profile="paper")).profile for name in PAPER_PROFILES}
    assert found == {
        "ptq4dm": "ptq4dm",
        "qdiffusion": "qdiffusion",
        "ptqd": "ptqd",
        "tfmq": "tfmq",
        "temporal_cache": "tfmq",
        "tcaq": "qdiffusion",
        "efficientdm": "efficientdm",
        "mpq": "mpq",
    }
    assert set(found.values()) <= set(PROFILES)
    for name in METHODS.keys() - PAPER_PROFILES:
        with pytest.raises(BadInput, match="which follows no paper's released code"):
            with_profile(name, Settings(profile="paper"))
        assert with_profile(name, Settings(profile="tfmq")).profile == "tfmq"
    assert with_profile("tfmq", Settings(profile="mpq")).profile == "mpq"


def test_python_resolves_paper_too(tmp_path):
    plan = packed(tiny_pipelines.ldm(tmp_path), method="efficientdm", profile="paper").plan
    assert plan.summary["profile"] == "efficientdm" and bits(plan, "conv_in") == (8, 8)
    with pytest.raises(BadInput, match="found profile paper with minmax"):
        packed(tiny_pipelines.ddim(tmp_path), profile="paper")


def test_bits_of_parts_replace_those_of_the_profile(tmp_path):
    options = {"ends": 4, "end_inputs": 8, "softmax": 8, "temporal": 8, "temporal_inputs": 32}
    for profile in ("full", "tfmq"):
        plan = packed(tiny_pipelines.ddim(tmp_path), profile=profile, **options).plan
        assert bits(plan, "conv_in") == bits(plan, "conv_out") == (4, 8)
        for name in ("time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"):
            assert bits(plan, name) == (8, FLOAT)
        assert bits(plan, "mid_block.resnets.0.conv1") == (4, 6)
        [kinds] = {
            tuple(part[name].input and part[name].input.bits for name in ("q", "softmax"))
            for part in plan.attentions.values()
        }
        assert kinds == ((6, 8) if profile == "full" else (None, 8))


@pytest.mark.parametrize(
    "options",
    [
        {"profile": "qdiffusion", "method": "qdiffusion"},
        {"profile": "tfmq", "softmax": 8, "method": "tfmq"},
        {"profile": "full", "softmax": 32, "method": "best"},
        {"profile": "full", "softmax": 6, "inputs": 4, "method": "tcaq"},
        {"profile": "full", "softmax": 32, "inputs": 4, "method": "tcaq"},
        {"profile": "full", "inputs": 32, "softmax": 8, "temporal": 32},
        {"profile": "mpq", "method": "mpq", "weights": 2, "inputs": 4},
        {"profile": "ptqd", "method": "ptqd"},
        {"profile": "ptq4dm", "method": "ptq4dm", "ends": 2, "end_inputs": 4},
    ],
    ids=str,
)
def test_what_is_saved_draws_the_same(options, tmp_path):
    result = packed(tiny_pipelines.ldm(tmp_path), **options)
    request = sampling.Request(steps=2, seeds=(3, 4))
    drawn = sampling.images(result.pipe, request)
    again = lowtide.load(result.save(tmp_path / "packed"))
    assert (sampling.images(again, request) == drawn).all()
    with lowtide.unfused(again):
        plain = sampling.images(again, request)
    assert torch.from_numpy(plain - drawn).norm() < 1e-3 * torch.from_numpy(plain).norm()


def test_the_log2_grid_of_a_softmax_has_its_own_bits(tmp_path):
    result = packed(tiny_pipelines.ddim(tmp_path), method="tcaq", inputs=4, softmax=7)
    assert {part["softmax"].input.bits for part in result.plan.attentions.values()} == {7}


def test_plan_predicts_the_bytes_of_each_profile(tmp_path):
    pipe = tiny_pipelines.ldm(tmp_path)
    pipe.save_pretrained(tmp_path / "float")
    for profile in PROFILES:
        options = {"method": "minmax", "weights": 4, "inputs": 6, "profile": profile}
        options |= {"steps": 2, "images": 2}
        predicted = lowtide.plan(str(tmp_path / "float"), **options).size
        account = lowtide.quantize(str(tmp_path / "float"), **options).report["account"]
        for kind in ("codes", "scales", "tables", "float"):
            assert predicted[kind] == account[kind]


def test_parts_that_a_model_lacks_are_refused(tmp_path):
    pipe = tiny_pipelines.ddim(tmp_path)
    kinds = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    plain = type(pipe.unet)(**dict(pipe.unet.config) | kinds | {"add_attention": False})
    pipe = type(pipe)(plain, pipe.scheduler)
    with pytest.raises(BadInput, match="found softmax with a model that has no attention"):
        packed(pipe, softmax=8)


def test_each_layer_is_in_one_part_and_every_profile_names_parts_that_exist(tmp_path):
    parts = parts_of_layers(adapt(tiny_pipelines.ldm(tmp_path).unet))
    kinds = set(parts.values())
    assert kinds >= {"first", "last", "time1", "time2", "temporal", "shortcuts", "conv1d", "entry"}
    assert [list(parts.values()).count(kind) for kind in ("first", "last", "entry")] == [1, 1, 1]
    for profile in PROFILES.values():
        assert set(profile.weights) | set(profile.inputs) <= kinds


def test_a_run_in_float_has_no_eight_bits_left():
    role = sampling.drivers.Role(latents=True, prompted=False)
    whole = Bits(Settings(weights=32, inputs=16, profile="efficientdm"), role)
    assert whole.weight("first") == 32 and whole.input("last") == 16
    assert Bits(Settings(inputs=32, profile="qdiffusion"), role).softmax == 32


def test_shortcuts_are_split_where_the_profile_rounds_them(tmp_path):
    for profile, splits in (("qdiffusion", True), ("tfmq", False), ("ptqd", False)):
        result = packed(tiny_pipelines.ldm(tmp_path), method="qdiffusion", profile=profile)
        assert bool(result.plan.splits) is splits


def test_every_profile_is_an_option_of_every_method():
    for method in METHODS:
        for profile in PROFILES:
            assert recipe_of(method, Settings(profile=profile, softmax=8, ends=4))
