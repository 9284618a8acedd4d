"""The native Stream: roundings bit for bit, activations, sinks with padding and upsampling."""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from native_programs import Memory, Steps, code_sink, float_sink, generator, pick, relative, sinks
from torch import Tensor

from lowtide.kernels import divide, quantize_input
from lowtide.kernels.native_library import (
    GELU_ERF,
    GELU_TANH,
    IDENTITY,
    NOT_A_NUMBER,
    SILU,
    Stream,
)

ACTIVATIONS = {
    SILU: F.silu,
    GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
    GELU_ERF: F.gelu,
    IDENTITY: lambda x: x,
}
# The largest mantissa, and scales whose inverse is no normal number, are hard to divide by.
SCALES = [0.037, 1.0, 2.0 - 2**-23, 3e-12, 1e-29, 1e-39, 7e29, 3e35]
ENDS = [float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e30, -1e30, 1e-45, -0.0, 0.0]


def stream(at: Memory, inputs: tuple[Tensor, ...], **fields: object) -> Stream:
    """A stream of one or two inputs, (batch, height, width, channels)."""
    batch, height, width, _ = inputs[0].shape

    def pair(kind: type, numbers: list) -> ctypes.Array:
        return (kind * 2)(*numbers)

    return Stream(
        x=pair(ctypes.c_void_p, [at(x) for x in inputs]),
        channels=pair(ctypes.c_int64, [x.shape[3] for x in inputs]),
        x_sample=pair(ctypes.c_int64, [x.stride(0) for x in inputs]),
        x_row=pair(ctypes.c_int64, [x.stride(1) for x in inputs]),
        x_column=pair(ctypes.c_int64, [x.stride(2) for x in inputs]),
        batch=batch,
        height=height,
        width=width,
        **fields,
    )


def padded(channels: int) -> int:
    return -(-channels // 4) * 4


def rounded_by(machine, x: Tensor, steps: Steps, smooth: Tensor | None = None) -> Tensor:
    """The codes of x, (1, 1, pixels, channels)."""
    at = Memory()
    codes = torch.full((*x.shape[:3], padded(x.shape[3])), 7, dtype=torch.uint8)
    sink = code_sink(at, codes, steps, smooth=smooth)
    assert machine.run(stream(at, (x,), **sinks(sink))) == 0
    assert not codes[..., x.shape[3] :].any()
    return codes[..., : x.shape[3]]


def hard_values(scale: float, random: torch.Generator) -> Tensor:
    """Random values, ties between two codes and their neighbours, and the ends of float32."""
    spread = torch.randn(600, generator=random) * scale * 90
    ties = (torch.arange(-300, 300) + 0.5) * torch.tensor(scale)
    beside = [torch.nextafter(ties, torch.full_like(ties, far)) for far in (-9e37, 9e37)]
    values = torch.cat([spread, ties, *beside, torch.tensor(ENDS)])
    return values.repeat(2)[: 51 * 48]


@pytest.mark.parametrize("channels", [3, 48])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("zero", "top"), [(0, 255), (117, 255), (255, 255), (7, 15), (1, 1)])
def test_codes_are_those_of_the_plain_kernel(machine, scale, zero, top, channels):
    steps = Steps(scale, zero, top)
    x = hard_values(scale, generator(scale)).reshape(1, 1, -1, channels)
    codes = rounded_by(machine, x, steps)
    assert torch.equal(codes.float(), steps.codes(x))
    one = torch.tensor(scale)
    plain = quantize_input(x, one, torch.tensor(float(zero)), top)
    assert torch.equal((codes.float() - zero) * one, plain)


def test_ties_of_random_scales(machine):
    random = generator("ties")
    for _ in range(20):
        scale = float(torch.rand((), generator=random) + 1e-3)
        steps = Steps(scale, pick(range(256), random))
        x = hard_values(scale, random).reshape(1, 1, -1, pick((1, 16, 24, 48), random))
        assert torch.equal(rounded_by(machine, x, steps).float(), steps.codes(x))


def hard_divisors(channels: int, random: torch.Generator) -> Tensor:
    """Divisors of every size that has an inverse, with the largest mantissa and powers of two."""
    mantissas = torch.tensor([2.0 - 2**-23, 1.0, 1.0 + 2**-23, 1.5])
    powers = torch.randint(-99, 99, (channels,), generator=random).float().exp2()
    some = torch.rand(channels, generator=random) + 0.1
    hard = mantissas[torch.randint(4, (channels,), generator=random)] * powers
    return torch.where(torch.rand(channels, generator=random) < 0.5, some, hard)


@pytest.mark.parametrize("divisors", ["usual", "hard", "without inverses"])
@pytest.mark.parametrize("channels", [1, 5, 16, 37, 64, 528])
def test_smoothing_divides_each_channel_first(machine, channels, divisors):
    random = generator(channels, divisors)
    scale = 0.021
    smooth = torch.rand(channels, generator=random) + 0.1
    if divisors != "usual":
        smooth = hard_divisors(channels, random)
    if divisors == "without inverses":
        smooth[:: channels // 4 + 1] = 1e-36
    quotients = torch.cat([hard_values(scale, random), torch.randn(40 * 528, generator=random)])
    rows = len(quotients) // channels
    x = quotients[: rows * channels].reshape(1, 1, rows, channels) * smooth
    steps = Steps(scale, 99)
    codes = rounded_by(machine, x, steps, smooth)
    assert torch.equal(codes.float(), steps.codes(divide(x, smooth)))


def test_quotients_are_those_of_a_division(machine):
    """Each quotient lies next to a tie of codes, so one that is rounded otherwise shows."""
    random = generator("quotients")
    steps = Steps(1.0, 128)
    smooth = torch.rand(64, generator=random) + 0.5
    ties = torch.randint(-120, 120, (4000, 64), generator=random) + 0.5
    beside = torch.randint(-3, 4, (4000, 64), generator=random) * 2.0**-24
    x = ((ties * (1 + beside)) * smooth).reshape(1, 1, 4000, 64)
    codes = rounded_by(machine, x, steps, smooth)
    assert torch.equal(codes.float(), steps.codes(divide(x, smooth)))
    assert not torch.equal(codes.float(), steps.codes(x * (1 / smooth)))


@pytest.mark.parametrize("channels", [16, 21])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_smoothing_of_what_is_no_number(machine, value, channels):
    """NaN is reported; infinity is the last code, as a value is whose quotient overflows."""
    x = torch.ones(1, 1, 2, channels)
    x[0, 0, 1, 3] = value
    x[0, 0, 1, 4] = -3e38
    smooth = torch.full((channels,), 0.01)
    at = Memory()
    codes = torch.zeros(1, 1, 2, padded(channels), dtype=torch.uint8)
    sink = code_sink(at, codes, Steps(0.7, 11), smooth=smooth)
    reported = machine.run(stream(at, (x,), **sinks(sink)))
    assert reported == (NOT_A_NUMBER if value != value else 0)
    if value == value:
        assert torch.equal(codes[..., :channels].float(), Steps(0.7, 11).codes(divide(x, smooth)))


@pytest.mark.parametrize("channels", [16, 48, 700])
@pytest.mark.parametrize("activation", [IDENTITY, GELU_ERF])
def test_sinks_with_divisors_of_their_own(machine, activation, channels):
    random = generator("own", channels, activation)
    x = torch.randn(2, 3, 4, channels, generator=random)
    times = torch.randn(2, 3, 4, channels, generator=random)
    at = Memory()
    strides = dict(zip(("t_sample", "t_row", "t_column"), times.stride(), strict=False))
    fields = {"times": at(times), "activation": activation, **strides}
    y = torch.full_like(x, float("nan"))
    stores = [float_sink(at, y)]
    expected = []
    for number in range(3):
        smooth = None if number == 1 else torch.rand(channels, generator=random) + 0.1
        codes = torch.full((*x.shape[:3], padded(channels)), 7, dtype=torch.uint8)
        steps = Steps(0.01 * (number + 1), 90 + number)
        stores.append(code_sink(at, codes, steps, smooth=smooth))
        expected.append((codes, steps, torch.empty(0) if smooth is None else smooth))
    assert machine.run(stream(at, (x,), **fields, **sinks(*stores))) == 0
    for codes, steps, smooth in expected:
        assert torch.equal(codes[..., :channels].float(), steps.codes(divide(y, smooth)))


@pytest.mark.parametrize("channels", [21, 32])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_is_reported_by_code_sinks_alone(machine, activation, channels):
    at = Memory()
    x = torch.randn(2, 3, 4, channels, generator=generator(activation))
    x[1, 2, 3, 20] = float("nan")
    y = torch.zeros_like(x)
    codes = torch.zeros(2, 3, 4, padded(channels), dtype=torch.uint8)
    rounding = code_sink(at, codes, Steps(0.1, 3))
    fields = {"activation": activation}
    assert machine.run(stream(at, (x,), **fields, **sinks(float_sink(at, y)))) == 0
    assert y.isnan().nonzero().tolist() == [[1, 2, 3, 20]]
    assert machine.run(stream(at, (x,), **fields, **sinks(rounding))) == NOT_A_NUMBER
    x[1, 2, 3, 20] = 1.0
    assert machine.run(stream(at, (x,), **fields, **sinks(rounding))) == 0


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(machine, activation):
    """Within 1e-6 near zero, in the middle and where they saturate."""
    random = generator("activation", activation)
    for size in (0.01, 1.0, 4.0, 30.0):
        at = Memory()
        x = torch.randn(1, 3, 5, 33, generator=random) * size
        y = torch.full_like(x, float("nan"))
        fields = {"activation": activation, **sinks(float_sink(at, y))}
        assert machine.run(stream(at, (x,), **fields)) == 0
        assert relative(y, ACTIVATIONS[activation](x.double())) < 1e-6


@pytest.mark.parametrize("activation", [SILU, GELU_TANH, GELU_ERF])
def test_activations_of_infinity(machine, activation):
    at = Memory()
    x = torch.tensor([float("inf"), 3e38, 1e19, 100.0, 0.0, -100.0, -1e19]).reshape(1, 1, 1, 7)
    y = torch.zeros_like(x)
    sink = float_sink(at, y)
    assert machine.run(stream(at, (x,), activation=activation, **sinks(sink))) == 0
    assert torch.allclose(y, x.clamp(min=0), rtol=1e-6, atol=1e-18)


@pytest.mark.parametrize(
    "split", [(16, 0), (7, 0), (5, 12), (32, 33), (70, 3), (80, 0), (32, 48)], ids=str
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gain_and_offset_of_inputs_side_by_side(machine, split, activation):
    random = generator(split, activation)
    batch, height, width = 2, 3, 5
    inputs = tuple(
        torch.randn(batch, height, width, part, generator=random) for part in split if part
    )
    x = torch.cat(inputs, -1)
    channels = x.shape[-1]
    gain = torch.randn(batch, channels, generator=random)
    offset = torch.randn(batch, channels, generator=random)
    at = Memory()
    y = torch.full_like(x, float("nan"))
    codes = torch.full((batch, height, width, padded(channels)), 7, dtype=torch.uint8)
    steps = Steps(0.031, 90)
    fields = {"gain": at(gain), "offset": at(offset), "activation": activation}
    stores = sinks(float_sink(at, y), code_sink(at, codes, steps))
    assert machine.run(stream(at, inputs, **fields, **stores)) == 0
    affine = x.double() * gain[:, None, None] + offset[:, None, None]
    assert relative(y, ACTIVATIONS[activation](affine)) < 1e-6
    assert torch.equal(codes[..., :channels].float(), steps.codes(y))
    alone = torch.full_like(codes, 7)
    rounding = sinks(code_sink(at, alone, steps))
    assert machine.run(stream(at, inputs, **fields, **rounding)) == 0
    assert torch.equal(alone, codes)


@pytest.mark.parametrize("channels", [3, 16, 50])
def test_multiplies_by_another_tensor(machine, channels):
    random = generator("times", channels)
    both = torch.randn(2, 3, 4, 2 * channels, generator=random)
    x = both[..., :channels]
    times = both[..., channels:]
    at = Memory()
    y = torch.full(x.shape, float("nan"))
    strides = dict(zip(("t_sample", "t_row", "t_column"), times.stride(), strict=False))
    fields = {"times": at(times), "activation": GELU_ERF, **strides}
    assert machine.run(stream(at, (x,), **fields, **sinks(float_sink(at, y)))) == 0
    assert relative(y, F.gelu(x.double()) * times) < 1e-6


def as_stored(values: Tensor, steps: Steps, upsample: int, padding: tuple, channels: int) -> Tensor:
    """What a code sink leaves in memory, from float values (batch, height, width, channels)."""
    codes = steps.codes(values).repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    above, left, below, right = padding
    zero = min(max(steps.zero, 0), steps.top)
    room = F.pad(codes, (0, 0, left, right, above, below), value=zero)
    return F.pad(room, (0, channels - room.shape[-1])).to(torch.uint8)


def random_sink(at: Memory, x: Tensor, random: torch.Generator) -> tuple:
    """A code sink with its own grid, padding and upsampling, and what it has to store."""
    batch, height, width, channels = x.shape
    upsample = pick((1, 2), random)
    padding = tuple(pick((0, 0, 1, 2), random) for _ in range(4))
    above, left, below, right = padding
    memory = padded(channels) + pick((0, 4), random)
    down = above + height * upsample + below
    across = left + width * upsample + right
    codes = torch.full((batch, down, across, memory), 7, dtype=torch.uint8)
    steps = Steps(pick((0.02, 0.5), random), pick((0, 9, 200), random), pick((15, 255), random))
    sides = dict(zip(("above", "left", "below", "right"), padding, strict=True))
    sink = code_sink(at, codes, steps, upsample=upsample, **sides)
    return sink, codes, as_stored(x, steps, upsample, padding, memory)


@pytest.mark.parametrize("case", range(20))
def test_up_to_four_sinks_pad_and_upsample(machine, case):
    random = generator("sinks", case)
    shape = [pick(range(1, 4), random), *(pick(range(1, 8), random) for _ in range(2))]
    x = torch.randn(*shape, pick((1, 4, 15, 16, 18, 64), random), generator=random)
    at = Memory()
    stored = [random_sink(at, x, random) for _ in range(pick(range(1, 5), random))]
    if len(stored) < 4 and pick((True, False), random):
        above, left, below, right, more = (pick((0, 1, 2), random) for _ in range(5))
        larger = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
        larger = F.pad(larger, (0, more, left, right, above, below))
        y = torch.full_like(larger, float("nan"))
        stored.append((float_sink(at, y, upsample=2, above=above, left=left, below=below,
                                  right=right), y, larger))  # fmt: skip
    assert machine.run(stream(at, (x,), **sinks(*(sink for sink, _, _ in stored)))) == 0
    for _, found, expected in stored:
        assert torch.equal(found, expected)
