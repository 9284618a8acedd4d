"""Whole denoisers as programs of Triton kernels: UNets and transformers, equal layer by layer.

Without a CUDA card, the kernels run in Triton's interpreter, which is slow, so models are tiny.
"""

import pytest
import tiny
import tiny_pipelines
import torch
from fused_networks import ROUNDED_ALIKE, distance
from gpu.networks import inputs_of, packed
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

from triton_interpreter import interpret

import lowtide
from lowtide import runtime, sampling
from lowtide.methods import relevant_options

QUICK = {"steps": 2, "images": 1, "calibration_steps": 2, "iters": 1, "batch": 1}
SMALL = {"sample_size": 4, "block_out_channels": (8, 16), "norm_num_groups": 4}
ONE_LEVEL = {
    "sample_size": 4,
    "block_out_channels": (16,),
    "norm_num_groups": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
# A model, the least number of calls of ours, and the layers that are not fused.
NETWORKS = {
    "unet": (lambda: tiny.unet2d(**SMALL), 80, {"conv_in", "conv_out"}),
    "unet-text": (
        lambda: tiny.unet_condition(**ONE_LEVEL, cross_attention_dim=16),
        50,
        {"conv_in", "conv_out"},
    ),
    "dit": (tiny.dit, 30, {"pos_embed.proj", "proj_out_2"}),
}
# Those of whole pipelines, and ranges for each step.
PIPELINES = {
    "ddim": (100, {"conv_in", "conv_out"}),
    "sd": (100, {"conv_in", "conv_out"}),
    "sdxl": (100, {"conv_in", "conv_out"}),
    "dit": (30, {"pos_embed.proj", "proj_out_2"}),
    "pixart": (30, {"pos_embed.proj", "proj_out"}),
    "sd3": (30, {"pos_embed.proj", "proj_out"}),
    "flux": (30, {"x_embedder", "proj_out"}),
}


@pytest.fixture
def on_card(monkeypatch):
    interpret(monkeypatch, columns=64)


def denoiser(name: str, folder) -> tuple[nn.Module, list[tuple[tuple, dict]]]:
    """A packed denoiser, and its calls while a pipeline draws."""
    pipe = tiny_pipelines.PIPELINES[name](folder)
    request = tiny_pipelines.request_fields(name)
    options = relevant_options("tfmq", QUICK | request)
    model = lowtide.quantize(pipe, method="tfmq", **options).model
    calls: list[tuple[tuple, dict]] = []
    hook = model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with runtime.plain(model):
        sampling.images(pipe, sampling.Request(steps=2, seeds=(5,), batch=1, **request))
    hook.remove()
    return model, calls


def answer(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@torch.no_grad()
def check(model: nn.Module, args: tuple, kwargs: dict, least: int, unfused: set[str]) -> None:
    with runtime.plain(model):
        plain = answer(model(*args, **kwargs))
    found = answer(model(*args, **kwargs))
    assert distance(found, plain) < ROUNDED_ALIKE
    told = runtime.explain(model)
    assert told["native"] >= least
    assert set(told["unsupported"]) == unfused


@pytest.mark.parametrize("name", NETWORKS)
def test_denoisers(name, on_card):
    make, least, unfused = NETWORKS[name]
    model = make().eval().requires_grad_(requires_grad=False)
    inputs = inputs_of(model, 1)
    runtime.fuse(packed(model, 4, 8))
    check(model, (), inputs, least, unfused)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_and_ranges_of_each_step(name, tmp_path, on_card):
    model, [*_, (args, kwargs)] = denoiser(name, tmp_path)
    check(model, args, kwargs, *PIPELINES[name])
