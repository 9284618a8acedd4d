"""Calls that move values: joined, upsampled, padded and viewed."""

import pytest
import torch
import torch.nn.functional as F
from fused_networks import IMAGE, TOKENS, Fused, Network, conv, needs_library
from torch import Tensor, nn

from lowtide.runtime.steps import StreamStep

pytestmark = needs_library


def joined(layers, x: Tensor, time: Tensor) -> Tensor:
    """A decoder's block: the skip connection is read by a norm and by a shortcut."""
    both = torch.cat([layers.a(x), x], 1)
    return layers.shortcut(both) + layers.b(F.silu(layers.norm(both)))


def test_values_side_by_side_are_never_copied():
    layers = {
        "a": conv(16, 8),
        "shortcut": conv(24, 16, kernel_size=1, padding=0),
        "norm": nn.GroupNorm(3, 24),
        "b": conv(24, 16),
    }
    fused = Fused(Network(joined, **layers), *IMAGE).check()
    assert "cat" not in fused.names
    assert "copy" not in fused.names
    assert any(isinstance(step, StreamStep) and len(step.sources) == 2 for step in fused.steps)


def test_part_of_values_side_by_side():
    def forward(layers, x, time):
        both = torch.cat([layers.a(x), x], 1)
        return layers.b(both[:1]) + layers.b(both[1:])

    Fused(Network(forward, a=conv(16, 8), b=conv(24, 16)), *IMAGE).check()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_tokens_side_by_side(axis):
    def forward(layers, x, time):
        both = torch.cat([layers.a(x), x], axis)
        return layers.b(both)

    width = 32 if axis in (2, -1) else 16
    network = Network(forward, a=nn.Linear(16, 16), b=nn.Linear(width, 8))
    Fused(network, *TOKENS).check()


def test_transposed_tokens_side_by_side():
    def forward(layers, x, time):
        return layers.b(torch.cat([layers.a(x).transpose(1, 2), x], 2))

    Fused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(32, 8)), 2, 16, 16).check()


@pytest.mark.parametrize("size", [{"scale_factor": 2.0}, {"size": (12, 12)}, {"size": (9, 12)}])
def test_upsampling(size):
    def forward(layers, x, time):
        return layers.b(F.interpolate(layers.a(x), mode="nearest", **size))

    fused = Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()
    assert ("interpolate" in fused.names) == (size == {"size": (9, 12)})


def test_upsampling_of_tokens_as_an_image():
    def forward(layers, x, time):
        image = F.silu(layers.a(x)).transpose(1, 2).reshape(2, 16, 2, 5)
        return layers.b(F.interpolate(image, scale_factor=2.0))

    Fused(Network(forward, a=nn.Linear(16, 16), b=conv()), *TOKENS).check()


@pytest.mark.parametrize("amounts", [(0, 1, 0, 1), (2, 0, 1, 3), (-1, 0, 0, 0)])
def test_asymmetric_padding(amounts):
    def forward(layers, x, time):
        padded = F.pad(layers.a(x), amounts)
        return layers.b(padded).mean((2, 3)) + padded.mean((2, 3))

    network = Network(forward, a=conv(), b=conv(stride=2, padding=0))
    Fused(network, *IMAGE).check()


def test_padding_after_upsampling():
    def forward(layers, x, time):
        return layers.b(F.pad(F.interpolate(F.silu(x), scale_factor=2.0), (0, 1, 0, 1)))

    Fused(Network(forward, b=conv(stride=2)), *IMAGE).check()


def test_padding_with_ones_is_left_to_torch():
    network = Network(lambda layers, x, time: layers.b(F.pad(x, (1, 1, 1, 1), value=1.0)), b=conv())
    assert "pad" in Fused(network, *IMAGE).check().names


def test_a_chunk_is_no_copy():
    def forward(layers, x, time):
        one, other = layers.a(x).chunk(2, -1)
        return layers.b(one) + layers.c(other)

    layers = {"a": nn.Linear(16, 32), "b": nn.Linear(16, 8), "c": nn.Linear(16, 8)}
    assert "chunk" not in Fused(Network(forward, **layers), *TOKENS).check().names


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(2, 16 * 36),
        lambda x: x.view(2, 16 * 36),
        lambda x: x.flatten(1),
        lambda x: x.permute(0, 2, 3, 1).contiguous().view(2, 36 * 16),
    ],
)
def test_an_image_flattened_into_a_layer(change):
    def forward(layers, x, time):
        return layers.b(change(layers.a(x)))

    Fused(Network(forward, a=conv(), b=nn.Linear(16 * 36, 8)), *IMAGE).check()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.reshape(2, 16, 4, 9),
        lambda x: x.permute(0, 2, 3, 1).reshape(2, 16, 6, 6),
        lambda x: x.transpose(2, 3),
        lambda x: x.reshape(2, 4, 4, 6, 6).transpose(1, 2).reshape(2, 16, 6, 6),
        lambda x: x[:, :, 1:, 1:],
        lambda x: x[:, :, ::2],
        lambda x: x.reshape(1, 16, 12, 6),
    ],
)
@pytest.mark.parametrize("before", [F.silu, lambda x: x + 1])
def test_an_image_in_another_order(change, before):
    def forward(layers, x, time):
        return layers.b(change(before(layers.a(x))))

    Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()
