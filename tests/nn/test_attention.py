"""Quantized attention: diffusers' processors run with our attention, and 8 bits stay close."""

import pytest
import tiny
import torch
import torch.nn.functional as F

from lowtide.formats import Affine
from lowtide.models import adapt
from lowtide.nn.attention import QuantAttention
from lowtide.nn.clock import Clock
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer


class Plain:
    """The smallest processor: it ends in scaled_dot_product_attention, as diffusers' do."""

    def __call__(self, attn, q, k, v, mask=None, causal=False):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def quantized(format=None, active=True) -> QuantAttention:
    clock = Clock((0,), rows=4)
    quantizers = {
        part: Quantizer(format, clock, row) for row, part in enumerate(("q", "k", "v", "softmax"))
    }
    attention = QuantAttention(Plain(), quantizers)
    for part, quantizer in quantizers.items():
        if format is not None:
            lo, hi = (0.0, 1.0) if part == "softmax" else (-4.0, 4.0)
            quantizer.fit(torch.tensor([lo]), torch.tensor([hi]))
    attention.set_precision(Precision.of(weights=True, inputs=active))
    return attention


def qkv() -> tuple[torch.Tensor, ...]:
    return tuple(
        torch.randn(2, 3, 10, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)
    )


MASKS = pytest.mark.parametrize(
    "named",
    [
        {},
        {"causal": True},
        {"mask": torch.rand(2, 1, 10, 10) > 0.3},
        {"mask": torch.randn(2, 1, 10, 10)},
    ],
    ids=["plain", "causal", "bool", "additive"],
)


@MASKS
def test_without_formats_it_is_attention(named):
    ours = quantized()(None, *qkv(), **named)
    theirs = Plain()(None, *qkv(), **named)
    assert ((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_eight_bits_are_close_and_not_equal():
    ours = quantized(Affine(8))(None, *qkv())
    theirs = Plain()(None, *qkv())
    error = (ours - theirs).norm() / theirs.norm()
    assert 1e-4 < error < 0.03


@MASKS
def test_while_products_are_bf16_attention_stays_float32(named):
    """Only the inputs are rounded to bf16, by the products before; the gradient is exact, too."""
    low = [tensor.bfloat16().requires_grad_() for tensor in qkv()]
    with torch.autocast("cpu", torch.bfloat16):
        ours = quantized(Affine(2), active=False)(None, *low, **named)
    exact = [tensor.detach().float().requires_grad_() for tensor in low]
    theirs = Plain()(None, *exact, **named)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for rounded, tensor in zip(low, exact, strict=True):
        assert ((rounded.grad.float() - tensor.grad).norm() / tensor.grad.norm()) < 2**-8


def test_inactive_is_the_inner_processor_itself():
    assert torch.equal(quantized(Affine(2), active=False)(None, *qkv()), Plain()(None, *qkv()))


@pytest.mark.parametrize("name", ["unet2d", "unet-text", "dit", "pixart", "sd3", "flux"])
def test_every_attention_of_every_architecture_is_really_quantized(name):
    model = tiny.model(name)
    adapter = adapt(model)
    example = adapter.architecture.example(model, 2)
    with torch.no_grad():
        before = model(**example)[0]
        touched = {attention: wrapped(model, attention) for attention in adapter.attentions()}
        after = model(**example)[0]
    assert touched
    for name, parts in touched.items():
        assert all(quantizer.called for quantizer in parts), name
    assert (after - before).norm() / before.norm() > 1e-4


class Spy(Quantizer):
    """A quantizer of 2 bits that records whether it was called."""

    called = False

    def forward(self, x):
        self.called = True
        return super().forward(x)


def wrapped(model, name: str) -> list[Spy]:
    clock = Clock((0,), rows=4)
    parts = {
        part: Spy(Affine(2), clock, row) for row, part in enumerate(("q", "k", "v", "softmax"))
    }
    for spy in parts.values():
        spy.fit(-torch.ones(1), torch.ones(1))
    module = model.get_submodule(name)
    attention = QuantAttention(module.processor, parts)
    attention.set_precision(Precision.FULL)
    module.set_processor(attention)
    return list(parts.values())
