"""Quantized and packed layers agree bit for bit, and in 16 bits they equal the float layer."""

import pytest
import torch
from torch import nn

from lowtide.errors import BadInput
from lowtide.formats import Affine, Mixed, minmax, mse
from lowtide.nn.clock import Clock
from lowtide.nn.packed import packed_twin
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import quantized_layer
from lowtide.nn.quantizer import Quantizer, input_format

LAYERS = {
    "linear": (lambda: nn.Linear(40, 12), (4, 40)),
    "sequence": (lambda: nn.Linear(40, 12, bias=False), (4, 5, 40)),
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), (4, 8, 6, 6)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1), (4, 8, 6, 6)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=4), (4, 8, 6, 6)),
}
FORMATS = [
    *(Affine(bits, signed=bits in (1, 8), axis=0) for bits in range(1, 9)),
    Affine(4, signed=True, axis=0, group=16),
    Affine(3, signed=True, axis=0, group=7),
    Mixed((2, 3, 4) * 4),
]


def built(kind: str, form, inputs=8, per_step=True):
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make()
    x = torch.randn(shape)
    clock = Clock((900, 500, 100), rows=1, per_step=per_step)
    quantizer = Quantizer(input_format(inputs), clock, per_step=per_step)
    quantized = quantized_layer(layer, form, quantizer)
    if inputs <= 8:
        steps = 3 if per_step else 1
        shares = torch.arange(1, steps + 1) / steps
        quantizer.fit(x.amin() * shares, x.amax() * shares)
    clock.set(500)
    return layer, quantized, x, clock


def fit(quantized, search=minmax):
    form = quantized.format
    lo, hi = search(form.rows(quantized.weight.detach()), form)
    quantized.set_grid(form.params(lo, hi, quantized.weight.shape[0]))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_equals_simulated_bit_for_bit(kind, form):
    _, quantized, x, _ = built(kind, form)
    fit(quantized, mse)
    quantized.set_precision(Precision.FULL)
    simulated = quantized(x)
    packed = packed_twin(quantized)
    assert torch.equal(packed(x), simulated)
    assert packed.weight.dtype == torch.uint8
    assert isinstance(packed, nn.Conv2d if quantized.weight.dim() == 4 else nn.Linear)


def test_sixteen_bits_changes_nothing():
    layer, quantized, x, _ = built("conv", None, inputs=16)
    quantized.set_precision(Precision.FULL)
    assert torch.equal(quantized(x), layer(x))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_adaround_starts_at_nearest(form):
    _, quantized, _, _ = built("linear", form)
    fit(quantized)
    nearest = quantized.codes.clone()
    values = quantized.effective_weight().clone()
    quantized.start_rounding()
    soft = quantized.effective_weight()
    flat = quantized.weight.detach()
    inside = (quantized.position() > 0) & (quantized.position() < quantized.top(flat))
    # Soft decisions start at the float weight itself.
    assert (soft - flat)[inside].abs().max() < 1e-5
    assert torch.equal(quantized.finish_rounding(), nearest)
    assert torch.equal(quantized.effective_weight(), values)


def test_rounding_receives_a_gradient_and_the_weight_none():
    _, quantized, x, _ = built("conv", Affine(4, axis=0))
    fit(quantized)
    rounding = quantized.start_rounding()
    quantized(x).square().sum().backward()
    assert rounding.values().grad.abs().sum() > 0
    assert quantized.weight.grad is None


def test_mixed_steps_in_a_batch_equal_single_steps():
    _, quantized, x, clock = built("conv", Affine(4, axis=0))
    fit(quantized)
    quantized.set_precision(Precision.FULL)
    times = [900, 100, 500, 100]
    alone = []
    for place, timestep in enumerate(times):
        clock.set(timestep)
        alone.append(quantized.input(x[place : place + 1]))
    clock.set(torch.tensor(times))
    assert torch.equal(quantized.input(x), torch.cat(alone))
    assert not torch.equal(alone[1], quantized.input(x)[1:2] * 0)


def test_ranges_differ_by_step():
    _, quantized, x, clock = built("linear", Affine(4, axis=0))
    fit(quantized)
    quantized.set_precision(Precision.FULL)
    clock.set(900)
    narrow = quantized(x)
    clock.set(100)
    assert (quantized(x) - narrow).norm() / narrow.norm() > 0.05


def test_unknown_timestep_names_the_known():
    clock = Clock((900, 500, 100), rows=1, per_step=True)
    message = r"found timestep 321; expected one of the 3 .*900, 500, 100"
    with pytest.raises(BadInput, match=message):
        clock.set(321)


def test_half_precision_timesteps_are_recognised():
    clock = Clock((967, 934, 901), rows=1, per_step=True)
    clock.set(torch.tensor(934.0, dtype=torch.bfloat16))
    assert int(clock.index) == 1


def test_batch_of_one():
    _, quantized, x, _ = built("conv", Affine(4, axis=0))
    fit(quantized)
    quantized.set_precision(Precision.FULL)
    assert torch.allclose(quantized(x[:1]), quantized(x)[:1], atol=1e-5)


def test_with_one_range_for_all_steps_any_timestep_is_accepted():
    clock = Clock((900, 500, 100), rows=1, per_step=False)
    clock.set(321)
    assert int(clock.index) == 0
