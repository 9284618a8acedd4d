"""Whole denoisers as programs of Triton kernels: UNets and transformers, equal layer by layer.

Without a CUDA card, the kernels run in Triton's interpreter, which is slow, so models are tiny.
"""

import pytest
import tiny_pipelines
import torch
from fused_networks import ROUNDED_ALIKE, distance
from torch import Tensor, nn
from triton_layers import DEVICE

pytest.importorskip("triton", reason="triton is not installed")

import lowtide
from lowtide import runtime, sampling
from lowtide.kernels.triton import tiles
from lowtide.methods import relevant_options
from lowtide.runtime import network, on_gpu

QUICK = {"steps": 2, "images": 1, "calibration_steps": 2, "iters": 1, "batch": 1}
# What torch still runs of the part that reads the sample, and how many calls of ours there are.
NETWORKS = {
    "ddim": ("tfmq", 100, {"conv_in", "conv_out"}),
    "sd": ("minmax", 100, {"conv_in", "conv_out"}),
    "dit": ("tfmq", 20, {"pos_embed.proj", "proj_out_2"}),
}
SLOW = {
    "pixart": ("minmax", 20, {"pos_embed.proj", "proj_out"}),
    "sd3": ("minmax", 20, {"pos_embed.proj", "proj_out"}),
    "flux": ("minmax", 20, {"x_embedder", "proj_out"}),
    "sdxl": ("minmax", 100, {"conv_in", "conv_out"}),
}


@pytest.fixture
def on_card(monkeypatch):
    """Where there is no card, the interpreter takes its place, on tiles that it likes."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(on_gpu, "missing", lambda device: "")
        monkeypatch.setattr(network, "is_card", lambda device: True)
        wide = (tiles.Tile(64, 64, 128, 1, 1), tiles.Tile(64, 64, 64, 1, 1))
        monkeypatch.setitem(tiles.CARDS, tiles.INTERPRETER, tiles.Card(1, 2**20, wide))
        tiles.choose.cache_clear()


def denoiser(name: str, method: str, folder) -> tuple[nn.Module, list[tuple[tuple, dict]]]:
    """A packed denoiser on the device, and its calls while a pipeline draws."""
    pipe = tiny_pipelines.PIPELINES[name](folder)
    request = tiny_pipelines.request_fields(name)
    options = relevant_options(method, QUICK | request)
    model = lowtide.quantize(pipe, method=method, **options).model
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


def check(name: str, expected: tuple[str, int, set[str]], folder) -> None:
    method, least, in_torch = expected
    model, [(args, kwargs), *_] = denoiser(name, method, folder)
    with torch.no_grad():
        with runtime.plain(model):
            plain = answer(model(*args, **kwargs))
        found = answer(model(*args, **kwargs))
    assert distance(found, plain) < ROUNDED_ALIKE
    told = runtime.explain(model)
    assert told["native"] >= least
    assert set(told["unsupported"]) == in_torch


@pytest.mark.parametrize("name", NETWORKS)
def test_denoisers(name, tmp_path, on_card):
    check(name, NETWORKS[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_more_denoisers(name, tmp_path, on_card):
    check(name, SLOW[name], tmp_path)
