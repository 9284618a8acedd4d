"""Every method on three kinds of models, on an accelerator: the same numbers as on the CPU.

The accelerator is a pretend one, which computes as the CPU does. So everything is equal to the last
bit: codes, tables, images, and the images after saving and loading.
"""

from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import pretend_device
import pytest
import tiny
import tiny_pipelines
import torch

import lowtide
from lowtide import sampling
from lowtide.formats import search
from lowtide.machine import bf16
from lowtide.methods import METHODS, relevant_options
from lowtide.sampling.pipelines import Pipeline
from lowtide.stages import distill, reconstruct

OPTIONS = {
    "steps": 2,
    "images": 2,
    "calibration_steps": 1,
    "iters": 1,
    "range_iters": 1,
    "batch": 2,
}
KINDS = ("ddim", "sd", "dit")


@pytest.fixture(scope="module", autouse=True)
def quick_and_alike() -> Iterator[None]:
    """Products in float32 on both devices, searches with few candidates, and one judge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bf16, "time_in_bf16", lambda kind: float("inf"))
        patch.setattr(search, "COARSE", 2)
        patch.setitem(search.SEARCHES, "mse", partial(search.mse, candidates=4))
        patch.setattr(reconstruct, "JUDGES", 1)
        patch.setattr(distill, "JUDGES", 1)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """What a method makes of a kind of model on a device, made once."""

    @cache
    def make(kind: str, method: str, device: torch.device, place: str = "auto"):
        pipe = small(kind, tmp_path_factory.mktemp(kind))
        moved(pipe, device)
        conditions = tiny_pipelines.request_fields(kind)
        options = relevant_options(method, OPTIONS | conditions | {"place": place})
        return lowtide.quantize(pipe, method=method, **options)

    return make


def small(kind: str, folder: Path) -> Pipeline:
    """A pipeline of this kind with fewer layers than the other tests have."""
    pipe = tiny_pipelines.PIPELINES[kind](folder)
    if kind == "dit":
        pipe.transformer.transformer_blocks = pipe.transformer.transformer_blocks[:1]
        pipe.transformer.register_to_config(num_layers=1)
        return pipe
    make = tiny.unet2d if kind == "ddim" else tiny.unet_condition
    down = "AttnDownBlock2D" if kind == "ddim" else "CrossAttnDownBlock2D"
    torch.manual_seed(0)
    changes = {
        "block_out_channels": (16,),
        "down_block_types": (down,),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    }
    pipe.register_modules(unet=make(**changes).eval())
    return pipe


def moved(pipe: Pipeline, device: torch.device) -> None:
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.to(device)


def drawn(pipe: Pipeline, kind: str) -> np.ndarray:
    conditions = tiny_pipelines.request_fields(kind)
    request = sampling.Request(steps=2, seeds=(5, 6), batch=2, **conditions)
    with lowtide.unfused(pipe):
        return sampling.images(pipe, request)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_quantizing_gives_what_it_gives_on_the_cpu(method: str, kind: str, made, tmp_path: Path):
    ours = made(kind, method, torch.device("cpu"))
    with pretend_device.present() as device:
        theirs = made(kind, method, device)
        assert {each.device for each in theirs.model.state_dict().values()} == {device}
        states = [ours.model.state_dict(), theirs.model.state_dict()]
        assert states[0].keys() == states[1].keys()
        differing = [
            name
            for name, value in states[0].items()
            if not torch.equal(value, states[1][name].cpu())
        ]
        assert differing == []
        images = drawn(theirs.pipe, kind)
        assert np.array_equal(images, drawn(ours.pipe, kind))
        loaded = lowtide.load(theirs.save(tmp_path / "packed"))
        moved(loaded, device)
        assert np.array_equal(drawn(loaded, kind), images)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_blocks_that_come_one_by_one_give_what_the_whole_gives(method: str, kind: str, made):
    with pretend_device.present() as device:
        ours = made(kind, method, device, "blocks")
        theirs = made(kind, method, device)
    assert (ours.report["place"], theirs.report["place"]) == ("blocks", "whole")
    assert ours.report["seconds"].keys() == theirs.report["seconds"].keys()
    ours = ours.model.state_dict()
    theirs = theirs.model.state_dict()
    assert {each.device for each in ours.values()} == {device}
    assert ours.keys() == theirs.keys()
    differing = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert differing == []
