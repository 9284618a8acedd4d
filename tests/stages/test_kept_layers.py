"""keep_float: layers that are named stay in float, whatever the method."""

import pytest
import tiny
import torch

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.methods import relevant_options
from lowtide.nn.attention import QuantAttention
from lowtide.nn.packed import PackedConv2d, PackedLinear
from lowtide.stages.kept_layers import kept_in_float

FAST = {"steps": 2, "images": 2, "iters": 1, "calibration_steps": 1}
NAMES = ["conv_out", "mid_block.resnets.0.conv1", "up.0.conv_out", "mid_block.attn"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("conv_out", ["conv_out", "up.0.conv_out"]),
        ("mid_block", ["mid_block.resnets.0.conv1", "mid_block.attn"]),
        ("mid_block.*", ["mid_block.resnets.0.conv1", "mid_block.attn"]),
        ("resnets.0", ["mid_block.resnets.0.conv1"]),
        ("*.conv1", ["mid_block.resnets.0.conv1"]),
        ("up.0.conv_out", ["up.0.conv_out"]),
    ],
)
def test_a_pattern_is_whole_parts_of_a_name(pattern, expected):
    assert kept_in_float([pattern], NAMES) == expected


@pytest.mark.parametrize("pattern", ["conv", "mid", "nothing.*"])
def test_a_pattern_that_names_no_layer_is_an_error(pattern):
    with pytest.raises(BadInput, match=f"{pattern!r} in keep_float, which names no layer"):
        kept_in_float([pattern], NAMES)


@pytest.mark.parametrize("method", ["minmax", "best", "tfmq", "mpq"])
def test_named_layers_stay_in_float_with_every_method(method, tmp_path):
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    keep = ["conv_out", "mid_block.*", "time_embedding.linear_2"]
    options = relevant_options(method, FAST)
    quantized = lowtide.quantize(pipe, method=method, keep_float=keep, **options)
    state = quantized.model.state_dict()
    kept = [name for name in before if name.startswith(("conv_out", "mid_block"))]
    cached = quantized.plan.cached
    if cached:  # the float answers of the whole temporal block, unrounded where layers are kept
        assert cached["mid_block.resnets.0.time_emb_proj"].format is None
        assert cached["down_blocks.0.resnets.0.time_emb_proj"].format is not None
        kept = [name for name in kept if "time_emb_proj" not in name]
    else:
        kept.append("time_embedding.linear_2.weight")
    assert len(kept) > 10
    for name in kept:
        assert torch.equal(state[name], before[name]), name
    middle = list(quantized.model.mid_block.modules())
    kinds = PackedLinear | PackedConv2d | QuantAttention
    assert not any(isinstance(each, kinds) for each in middle)
    assert quantized.plan.left["conv_out"] == "kept in float (keep_float)"
    assert "input of conv_out" not in quantized.plan.left
    assert isinstance(quantized.model.conv_in, PackedConv2d)
    again = lowtide.load(quantized.save(tmp_path / "x")).unet.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())


def test_the_option_is_checked_before_any_work():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    with pytest.raises(BadInput, match="names no layer"):
        lowtide.quantize(pipe, method="minmax", keep_float=["mid"], steps=2, images=2)
    assert not hasattr(pipe.unet, "lowtide_clock")
