"""Every public architecture at full size, on the meta device: its units and its temporal block."""

from itertools import chain

import pytest
import torch
from configs import CONFIGS
from torch import nn

from lowtide.models import adapt

TEXT = "added_cond_kwargs.text_embeds"
TIMES = "added_cond_kwargs.time_ids"
SIZES = {"added_cond_kwargs.resolution", "added_cond_kwargs.aspect_ratio"}
POOLED = "pooled_projections"
# By name: ends, inputs of the temporal block, temporal units, features, millions of parameters.
EXPECTED = {
    "ddpm-cifar10": (("conv_in", "conv_out"), {"timestep"}, 1, 22, 35.75),
    "ldm-4": (("conv_in", "conv_out"), {"timestep"}, 1, 22, 274.1),
    "sd-1.5": (("conv_in", "conv_out"), {"timestep"}, 1, 22, 859.5),
    "sd-2.1": (("conv_in", "conv_out"), {"timestep"}, 1, 22, 865.9),
    "sdxl": (("conv_in", "conv_out"), {"timestep", TEXT, TIMES}, 1, 17, 2567.5),
    "dit-xl-2": (("pos_embed.proj", "proj_out_2"), {"timestep", "class_labels"}, 28, 29, 749.8),
    "pixart-512": (("pos_embed.proj", "proj_out"), {"timestep"}, 1, 2, 610.9),
    "pixart-1024": (("pos_embed.proj", "proj_out"), {"timestep", *SIZES}, 1, None, 611.3),
    "sd3-medium": (("pos_embed.proj", "proj_out"), {"timestep", POOLED}, 1, 49, 2028.3),
    "flux-dev": (("x_embedder", "proj_out"), {"timestep", POOLED, "guidance"}, 1, 77, 11901.4),
}


@pytest.fixture(scope="module", params=CONFIGS)
def case(request):
    kind, config = CONFIGS[request.param]
    with torch.device("meta"):
        model = kind(**config)
    return request.param, model, adapt(model)


def test_units_partition_every_linear_and_convolution(case):
    _, model, adapter = case
    every = sorted(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    )
    listed = chain.from_iterable(unit.layers for unit in adapter.units())
    assert sorted([*listed, *adapter.uncalled()]) == every
    assert len(adapter.uncalled()) == 0 or case[0] == "sd3-medium"


def test_ends_and_temporal_block(case):
    name, model, adapter = case
    ends, reads, units, features, millions = EXPECTED[name]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=1e-3)
    assert adapter.ends() == ends
    temporal = adapter.temporal()
    assert len(temporal) == units
    assert set().union(*(unit.reads for unit in temporal)) == reads
    if features is not None:
        assert sum(len(unit.features) for unit in temporal) == features


def test_blocks_stand_in_forward_order(case):
    _, _, adapter = case
    order = list(adapter.layers())
    first = [order.index(unit.layers[0]) for unit in adapter.units()]
    assert first == sorted(first)
    names = [unit.name for unit in adapter.blocks()]
    if "mid_block.resnets.0" in names:  # diffusers registers mid_block last
        assert names.index("mid_block.resnets.0") < names.index("up_blocks.0.resnets.0")


def test_every_attention_is_found(case):
    name, model, adapter = case
    assert len(adapter.attentions()) == sum(
        type(module).__name__ in ("Attention", "FluxAttention") for module in model.modules()
    )
    assert len(adapter.attentions()) >= (6 if name == "ddpm-cifar10" else 14)


def test_shortcuts_and_downsamplers():
    kind, config = CONFIGS["ddpm-cifar10"]
    with torch.device("meta"):
        adapter = adapt(kind(**config))
    # The released TFMQ code leaves 13 nin_shortcuts and 3 downsamplers in float.
    assert len(adapter.shortcuts()) == 13
    assert len(adapter.downsamplers()) == 3
