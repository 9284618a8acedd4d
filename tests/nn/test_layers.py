"""Quantized and packed layers: they agree bit for bit, 16 bits changes nothing, AdaRound starts at nearest."""

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
    layer, x = make(), torch.randn(shape)
    clock = Clock((900, 500, 100), rows=1, per_step=per_step)
    quantizer = Quantizer(input_format(inputs), clock, 0, per_step)
    fake = quantized_layer(layer, form, quantizer)
    if inputs <= 8:
        steps = 3 if per_step else 1
        quantizer.fit(
            x.amin() * torch.arange(1, steps + 1) / steps,
            x.amax() * torch.arange(1, steps + 1) / steps,
        )
    clock.set(500)
    return layer, fake, x, clock


def fit(fake, search=minmax):
    fake.set_grid(
        fake.format.params(
            *search(fake.format.rows(fake.weight.detach()), fake.format), fake.weight.shape[0]
        )
    )


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_equals_simulated_bit_for_bit(kind, form):
    _, fake, x, _ = built(kind, form)
    fit(fake, mse)
    fake.set_precision(Precision.FULL)
    simulated = fake(x)
    packed = packed_twin(fake)
    assert torch.equal(packed(x), simulated)
    assert packed.weight.dtype == torch.uint8
    assert isinstance(
        packed, nn.Conv2d if "weight" in dir(fake) and fake.weight.dim() == 4 else nn.Linear
    )


def test_sixteen_bits_changes_nothing():
    layer, fake, x, _ = built("conv", None, inputs=16)
    fake.set_precision(Precision.FULL)
    assert torch.equal(fake(x), layer(x))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_adaround_starts_at_nearest(form):
    _, fake, _, _ = built("linear", form)
    fit(fake)
    nearest, values = fake.codes.clone(), fake.effective_weight().clone()
    fake.start_rounding()
    soft = fake.effective_weight()
    flat = fake.weight.detach()
    inside = (fake.position() > 0) & (fake.position() < fake.top(flat))
    assert (soft - flat)[
        inside
    ].abs().max() < 1e-5  # soft decisions start at the float weight itself
    assert torch.equal(fake.finish_rounding(), nearest)
    assert torch.equal(fake.effective_weight(), values)


def test_rounding_receives_a_gradient_and_the_weight_none():
    _, fake, x, _ = built("conv", Affine(4, axis=0))
    fit(fake)
    rounding = fake.start_rounding()
    fake(x).square().sum().backward()
    assert rounding.values().grad.abs().sum() > 0
    assert fake.weight.grad is None


def test_mixed_steps_in_a_batch_equal_single_steps():
    _, fake, x, clock = built("conv", Affine(4, axis=0))
    fit(fake)
    fake.set_precision(Precision.FULL)
    times = [900, 100, 500, 100]
    alone = []
    for place, timestep in enumerate(times):
        clock.set(timestep)
        alone.append(fake.input(x[place : place + 1]))
    clock.set(torch.tensor(times))
    assert torch.equal(fake.input(x), torch.cat(alone))
    assert not torch.equal(alone[1], fake.input(x)[1:2] * 0)


def test_ranges_differ_by_step():
    _, fake, x, clock = built("linear", Affine(4, axis=0))
    fit(fake)
    fake.set_precision(Precision.FULL)
    clock.set(900)
    narrow = fake(x)
    clock.set(100)
    assert (fake(x) - narrow).norm() / narrow.norm() > 0.05


def test_unknown_timestep_names_the_known():
    clock = Clock((900, 500, 100), rows=1, per_step=True)
    with pytest.raises(
        BadInput, match=r"found timestep 321; expected one of the 3 .*900, 500, 100"
    ):
        clock.set(321)


def test_half_precision_timesteps_are_recognised():
    clock = Clock((967, 934, 901), rows=1, per_step=True)
    clock.set(torch.tensor(934.0, dtype=torch.bfloat16))
    assert int(clock.index) == 1


def test_batch_of_one():
    _, fake, x, _ = built("conv", Affine(4, axis=0))
    fit(fake)
    fake.set_precision(Precision.FULL)
    assert torch.allclose(fake(x[:1]), fake(x)[:1], atol=1e-5)


def test_with_one_range_for_all_the_timestep_is_no_matter():
    clock = Clock((900, 500, 100), rows=1, per_step=False)
    clock.set(321)
    assert int(clock.index) == 0
