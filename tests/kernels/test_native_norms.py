"""The native norms against torch in float64, and the table of a step's features."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from native_programs import Memory, Steps, code_sink, float_sink, generator, pick, relative, sinks
from torch import Tensor

from lowtide.kernels import divide
from lowtide.kernels.native_library import NOT_A_NUMBER, GroupMoments, LayerNorm, Row, Stream

EPSILON = 1e-5


def group_norm(
    machine, inputs: tuple[Tensor, ...], groups: int, affine: tuple[Tensor, Tensor] | None, blocks=3
) -> Tensor:
    """Group norm of inputs side by side, (batch, pixels, channels), as two kernels."""
    at = Memory()
    batch, pixels, _ = inputs[0].shape
    channels = sum(x.shape[2] for x in inputs)
    gain = torch.full((batch, channels), float("nan"))
    offset = torch.full((batch, channels), float("nan"))
    addresses = (ctypes.c_void_p * 2)(*[at(x) for x in inputs])
    widths = (ctypes.c_int64 * 2)(*[x.shape[2] for x in inputs])
    samples = (ctypes.c_int64 * 2)(*[x.stride(0) for x in inputs])
    strides = (ctypes.c_int64 * 2)(*[x.stride(1) for x in inputs])
    moments = GroupMoments(
        x=addresses,
        channels=widths,
        x_sample=samples,
        x_pixel=strides,
        batch=batch,
        pixels=pixels,
        groups=groups,
        epsilon=EPSILON,
        weight=at(affine[0]) if affine else None,
        bias=at(affine[1]) if affine else None,
        gain=at(gain),
        offset=at(offset),
        partial=at(torch.empty(batch, blocks, 2, channels)),
        blocks=blocks,
    )
    y = torch.full((batch, 1, pixels, channels), float("nan"))
    apply = Stream(
        x=addresses,
        channels=widths,
        x_sample=samples,
        x_column=strides,
        batch=batch,
        height=1,
        width=pixels,
        gain=at(gain),
        offset=at(offset),
        **sinks(float_sink(at, y)),
    )
    assert machine.run(moments, apply) == 0
    return y[:, 0]


def plain_group_norm(x: Tensor, groups: int, affine: tuple[Tensor, Tensor] | None) -> Tensor:
    weight, bias = [part.double() for part in affine] if affine else (None, None)
    images = x.double().transpose(1, 2)
    return F.group_norm(images, groups, weight, bias, EPSILON).transpose(1, 2)


@pytest.mark.parametrize("split", [(8,), (24, 40), (6, 30), (64, 128), (130, 14)], ids=str)
@pytest.mark.parametrize("blocks", [1, 3, 200])
def test_group_norm(machine, split, blocks):
    random = generator(split, blocks)
    pixels = pick((1, 5, 64, 150), random)
    inputs = tuple(torch.randn(2, pixels, part, generator=random) * 3 + 1 for part in split)
    channels = sum(split)
    affine = (torch.randn(channels, generator=random), torch.randn(channels, generator=random))
    for groups in (1, 2, channels // 2):
        for weights in (affine, None):
            found = group_norm(machine, inputs, groups, weights, blocks)
            expected = plain_group_norm(torch.cat(inputs, -1), groups, weights)
            # A group of one pixel and few channels has little spread, and so fewer exact digits.
            assert relative(found, expected) < (1e-6 if pixels > 1 else 1e-5)


def test_group_norm_reads_a_part_of_a_tensor(machine):
    x = torch.randn(2, 30, 48, generator=generator("part"))
    found = group_norm(machine, (x[..., 8:24],), 4, None)
    assert relative(found, plain_group_norm(x[..., 8:24], 4, None)) < 1e-6


@pytest.mark.parametrize("mean", [1000.0, -1000.0])
def test_group_norm_of_a_large_mean(machine, mean):
    """The moments are exact to float32; the offset, 1000 times the result, rounds at 2^-24."""
    random = generator("mean")
    x = torch.randn(2, 1000, 32, generator=random) + mean
    expected = plain_group_norm(x, 4, None)
    rounded_offset = abs(mean) * 2**-24
    assert relative(group_norm(machine, (x,), 4, None), expected) < 1e-6 + rounded_offset


def test_group_norm_of_a_constant_is_its_bias(machine):
    x = torch.full((1, 50, 16), 3.7)
    affine = (torch.ones(16), torch.arange(16.0))
    found = group_norm(machine, (x,), 2, affine)
    assert torch.allclose(found, torch.arange(16.0).expand_as(found), atol=1e-3)


def layer_norm(at: Memory, x: Tensor, **fields: object) -> LayerNorm:
    """Of x, (batch, rows, channels)."""
    batch, rows, channels = x.shape
    return LayerNorm(
        x=at(x),
        batch=batch,
        rows=rows,
        channels=channels,
        x_sample=x.stride(0),
        x_row=x.stride(1),
        epsilon=EPSILON,
        **fields,
    )


@pytest.mark.parametrize("channels", [1, 3, 16, 17, 31, 64, 200, 520])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm(machine, channels, modulated, affine):
    random = generator(channels, modulated, affine)
    batch = 2
    rows = 19
    x = torch.randn(batch, rows, channels, generator=random) * 2 + 0.5
    at = Memory()
    fields = {}
    expected = F.layer_norm(x.double(), (channels,), eps=EPSILON)
    if affine:
        weight = torch.randn(channels, generator=random)
        bias = torch.randn(channels, generator=random)
        fields |= {"weight": at(weight), "bias": at(bias)}
        expected = expected * weight + bias
    if modulated:
        # The shift and the gain of a sample lie in one row, as a modulation layer stores them.
        modulation = torch.randn(batch, 2 * channels, generator=random)
        shift = modulation[:, :channels]
        gain = modulation[:, channels:]
        fields |= {"gain": at(gain), "gain_stride": 2 * channels}
        fields |= {"shift": at(shift), "shift_stride": 2 * channels}
        expected = expected * gain[:, None] + shift[:, None]
    y = torch.full((batch, 1, rows, channels), float("nan"))
    codes = torch.full((batch, 1, rows, -(-channels // 4) * 4), 7, dtype=torch.uint8)
    divided = torch.full_like(codes, 7)
    smooth = torch.rand(channels, generator=random) + 0.1
    steps = Steps(0.03, 128)
    smoothed = code_sink(at, divided, steps, smooth=smooth)
    stores = sinks(float_sink(at, y), code_sink(at, codes, steps), smoothed)
    assert machine.run(layer_norm(at, x, **fields, **stores)) == 0
    assert (y[:, 0] - expected).norm() < 1e-6 * max(float(expected.norm()), 1.0)
    assert torch.equal(codes[..., :channels].float(), steps.codes(y))
    assert torch.equal(divided[..., :channels].float(), steps.codes(divide(y, smooth)))
    assert not codes[..., channels:].any()
    assert not divided[..., channels:].any()


def test_layer_norm_of_a_large_mean(machine):
    """The mean is a float32, which rounds at 2^-24 of itself; torch is as far from float64."""
    x = torch.randn(1, 50, 320, generator=generator("mean")) + 100
    at = Memory()
    y = torch.full((1, 1, 50, 320), float("nan"))
    assert machine.run(layer_norm(at, x, **sinks(float_sink(at, y)))) == 0
    expected = F.layer_norm(x.double(), (320,), eps=EPSILON)
    assert relative(y[:, 0], expected) < 100 * 2**-23


def test_layer_norm_reports_what_is_not_a_number(machine):
    x = torch.randn(1, 20, 40, generator=generator("nan"))
    x[0, 17, 39] = float("nan")
    at = Memory()
    codes = torch.zeros(1, 1, 20, 40, dtype=torch.uint8)
    norm = layer_norm(at, x, **sinks(code_sink(at, codes, Steps(0.03, 128))))
    assert machine.run(norm) == NOT_A_NUMBER


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_row_copies_the_features_of_a_step(machine, copies):
    table = torch.randn(5, 37, generator=generator("table"))
    at = Memory()
    step = torch.tensor(4)
    y = torch.full((4, 37), 7.0)
    row = Row(table=at(table), step=at(step), y=at(y), width=37, copies=copies)
    for index in (4, 0):
        step.fill_(index)
        assert machine.run(row) == 0
        assert torch.equal(y[:copies], table[index].expand(copies, -1))
    assert y[copies:].unique().tolist() == [7.0]
