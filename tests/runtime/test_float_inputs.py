"""Layers whose inputs stay in float run as native products of float32."""

import pytest
import torch.nn.functional as F
from fused_networks import Fused, Network, needs_library
from torch import nn

from lowtide.runtime.steps import GemmStep

pytestmark = needs_library
FLOAT = 32


def names(network: Network, *shape: int) -> list[str]:
    """The steps of the network, which gives what its plain layers give."""
    fused = Fused(network, *shape, inputs=FLOAT).check()
    products = [step for step in fused.steps if isinstance(step, GemmStep)]
    assert len(products) == len(network.layers)
    assert all(step.rounding is None for step in products)
    return fused.names


@pytest.mark.parametrize("channels", [3, 8])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_convolution_pads_what_it_reads(channels, padding):
    """Whole dwords of channels without padding are read where they are."""
    network = Network(
        lambda layers, x, time: layers.a(x), a=nn.Conv2d(channels, 5, 3, padding=padding)
    )
    in_place = channels == 8 and padding == 0
    assert names(network, 2, channels, 7, 6) == (["Gemm"] if in_place else ["Stream", "Gemm"])


def test_strides_and_activations():
    network = Network(
        lambda layers, x, time: layers.b(F.silu(layers.a(x))) + 1,
        a=nn.Conv2d(8, 16, 3, padding=1, stride=2),
        b=nn.Conv2d(16, 70, 1),
    )
    names(network, 2, 8, 9, 9)


@pytest.mark.parametrize("channels", [5, 16])
def test_linear_layers_read_tokens(channels):
    network = Network(
        lambda layers, x, time: x + layers.b(F.gelu(layers.a(x))),
        a=nn.Linear(channels, 40),
        b=nn.Linear(40, channels),
    )
    names(network, 2, 10, channels)


def test_a_value_that_is_changed_in_place_afterwards():
    def forward(layers, x, time):
        z = x + 1
        y = layers.a(z)
        z.mul_(2)
        return y + z

    names(Network(forward, a=nn.Linear(8, 8)), 2, 10, 8)
