"""The public full-size models on meta: units partition the layers; ends, temporal features and reads are as counted by hand."""

from functools import cache
from typing import NamedTuple

import configs
import pytest
from torch import nn

from lowtide.models import Adapter, adapt

TEXT_TIME = ("added_cond_kwargs.text_embeds", "added_cond_kwargs.time_ids", "timestep")
SIZES = ("added_cond_kwargs.aspect_ratio", "added_cond_kwargs.resolution", "timestep")


class Known(NamedTuple):
    parameters: int
    blocks: int
    features: int
    reads: tuple[str, ...]
    ends: tuple[str, str]
    downsamplers: int = 0


# UNets: blocks = residual blocks + attention or transformer blocks; features = residual blocks.
# Transformers: features = the linears that modulate a block or the output; PixArt's embedding meets the picture unmixed too.
KNOWN = {
    "ddpm-cifar10": Known(35_746_307, 22 + 6, 22, ("timestep",), ("conv_in", "conv_out"), 3),
    "ldm-4": Known(274_056_163, 22 + 16, 22, ("timestep",), ("conv_in", "conv_out"), 3),
    "sd-1.5": Known(859_520_964, 22 + 16, 22, ("timestep",), ("conv_in", "conv_out"), 3),
    "sd-2.1": Known(865_910_724, 22 + 16, 22, ("timestep",), ("conv_in", "conv_out"), 3),
    "sdxl": Known(2_567_463_684, 17 + 24 + 10 + 36, 17, TEXT_TIME, ("conv_in", "conv_out"), 2),
    "dit-xl": Known(749_826_464, 28, 28 + 1, ("class_labels", "timestep"), ("pos_embed.proj", "proj_out_2")),
    "pixart-512": Known(610_856_096, 28, 1 + 1, ("timestep",), ("pos_embed.proj", "proj_out")),
    "pixart-1024": Known(611_349_152, 28, 1 + 3, SIZES, ("pos_embed.proj", "proj_out")),
    "sd3-medium": Known(2_028_328_000, 24, 2 * 24 + 1, ("pooled_projections", "timestep"), ("pos_embed.proj", "proj_out")),
    "flux-dev": Known(
        11_901_408_320, 19 + 38, 2 * 19 + 38 + 1, ("guidance", "pooled_projections", "timestep"), ("x_embedder", "proj_out")
    ),
}
UNETS = ("ddpm-cifar10", "ldm-4", "sd-1.5", "sd-2.1", "sdxl")
every = pytest.mark.parametrize("name", KNOWN)


@cache
def built(name: str) -> nn.Module:
    return configs.build(name)


@cache
def adapter(name: str) -> Adapter:
    return adapt(built(name))


def linears_and_convolutions(name: str) -> list[str]:
    return [key for key, module in built(name).named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@every
def test_configuration_has_the_public_number_of_parameters(name: str) -> None:
    assert sum(parameter.numel() for parameter in built(name).parameters()) == KNOWN[name].parameters


@every
def test_units_partition_the_layers(name: str) -> None:
    listed = [layer for unit in adapter(name).units() for layer in unit.layers]
    assert len(listed) == len(set(listed))
    assert sorted(listed) == sorted(linears_and_convolutions(name))
    assert adapter(name).uncalled() == []


@every
def test_units_are_in_forward_order(name: str) -> None:
    place = {layer: number for number, layer in enumerate(adapter(name).layers())}
    units = adapter(name).units()
    assert all([place[layer] for layer in unit.layers] == sorted(place[layer] for layer in unit.layers) for unit in units)
    starts = [place[unit.layers[0]] for unit in units]
    assert starts == sorted(starts)


@every
def test_blocks_and_ends(name: str) -> None:
    known = KNOWN[name]
    assert len(adapter(name).blocks()) == known.blocks
    assert adapter(name).ends() == known.ends


@every
def test_temporal_features_and_reads(name: str) -> None:
    units = adapter(name).temporal()
    assert len(units) == (28 if name == "dit-xl" else 1)
    assert sum(len(unit.features) for unit in units) == KNOWN[name].features
    assert {unit.reads for unit in units} == {KNOWN[name].reads}


@pytest.mark.parametrize("name", UNETS)
def test_unet_features_are_the_residual_blocks_projections(name: str) -> None:
    (unit,) = adapter(name).temporal()
    assert set(unit.features) == {layer for layer in linears_and_convolutions(name) if layer.endswith("time_emb_proj")}
    assert len(adapter(name).downsamplers()) == KNOWN[name].downsamplers


@pytest.mark.parametrize("name", UNETS)
def test_the_middle_of_a_unet_comes_before_its_upper_half(name: str) -> None:
    spatial = [unit.name.split("_")[0] for unit in adapter(name).units() if unit.kind != "temporal"]
    assert [half for half, before in zip(spatial, [None, *spatial], strict=False) if half != before] == [
        "conv", "down", "mid", "up", "conv"
    ]  # fmt: skip


def test_each_block_of_dit_has_an_embedder_and_the_first_serves_the_output() -> None:
    first, *rest = adapter("dit-xl").temporal()
    prefix = "transformer_blocks.0.norm1"
    embedder = [f"{prefix}.emb.timestep_embedder.linear_{number}" for number in (1, 2)]
    assert sorted(first.layers) == sorted([*embedder, f"{prefix}.linear", "proj_out_1"])
    assert all(len(unit.layers) == 3 and len(unit.features) == 1 for unit in rest)


def test_timesteps_become_integers() -> None:
    assert {name: adapter(name).ticks for name in KNOWN if adapter(name).ticks != 1} == {"flux-dev": 1000}


def test_temporal_graphs_of_one_batch_share_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    one, recordings = adapt(built("dit-xl")), []
    record = one.graph
    monkeypatch.setattr(one, "graph", lambda *given: recordings.append(given) or record(*given))
    for unit in one.temporal():
        one.temporal_graph(unit, 3)
    assert len(recordings) == 1
