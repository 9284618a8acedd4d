"""What the lowering makes of a few layers: which steps there are, and that they give the same."""

import pytest
import torch
import torch.nn.functional as F
from fused_networks import IMAGE, TOKENS, Fused, Network, conv, needs_library
from torch import nn

from lowtide.runtime.steps import GemmStep, LayerNormStep, StreamStep

pytestmark = needs_library


def norm(channels: int = 16) -> nn.GroupNorm:
    layer = nn.GroupNorm(4, channels)
    nn.init.normal_(layer.weight, 1, 0.3)
    nn.init.normal_(layer.bias, 0, 0.3)
    return layer


def outputs(fused: Fused, kind: type) -> list[list[bool]]:
    """For each step of this kind, whether each of its outputs is codes."""
    return [
        [output.rounding is not None for output in step.outputs]
        for step in fused.steps
        if isinstance(step, kind)
    ]


def products(fused: Fused) -> list[GemmStep]:
    return [step for step in fused.steps if isinstance(step, GemmStep)]


# Norms and activations


def test_a_norm_between_two_layers_stores_codes_alone():
    network = Network(
        lambda layers, x, time: layers.b(F.silu(layers.norm(layers.a(x)))),
        a=conv(),
        norm=norm(),
        b=conv(),
    )
    fused = Fused(network, *IMAGE).check()
    assert fused.names == ["Stream", "Gemm", "Moments", "Stream", "Gemm"]
    assert outputs(fused, StreamStep) == [[True], [True]]


def test_a_norm_with_other_readers_is_stored_too():
    def forward(layers, x, time):
        normed = F.silu(layers.norm(x))
        return layers.a(normed) * normed.mean() + normed

    fused = Fused(Network(forward, norm=norm(), a=conv()), *IMAGE).check()
    assert outputs(fused, StreamStep) == [[True, False]]


def test_layers_with_one_input_share_its_codes():
    def forward(layers, x, time):
        return layers.a(x) * layers.b(x).sigmoid() + layers.c(x).sigmoid()

    layers = {name: nn.Linear(16, 16) for name in "abc"}
    fused = Fused(Network(forward, **layers), *TOKENS).check()
    assert outputs(fused, StreamStep) == [[True]]


def shared(layers, x, time):
    normed = layers.norm(x)
    return layers.a(normed) * layers.b(normed).sigmoid() + layers.c(normed).sigmoid()


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.Identity()])
def test_layers_with_equal_divisors_share_the_codes_of_their_input(norm):
    layers = {"norm": norm, **{name: nn.Linear(16, 16) for name in "abc"}}
    smooth = torch.rand(16) + 0.5
    equal = dict.fromkeys("abc", smooth)
    fused = Fused(Network(shared, **layers), *TOKENS, smooth=equal).check()
    [found] = outputs(fused, LayerNormStep) + outputs(fused, StreamStep)
    assert found == [True]
    fused = Fused(Network(shared, **layers), *TOKENS, smooth=equal | {"b": 2 * smooth}).check()
    [found] = outputs(fused, LayerNormStep) + outputs(fused, StreamStep)
    assert found == [True, True]


def test_divisors_of_layers_behind_a_norm_and_a_product():
    def forward(layers, x, time):
        hidden = F.silu(layers.norm(layers.a(x)))
        return layers.c(F.gelu(layers.b(hidden.mean((2, 3)))))

    layers = {"a": conv(16, 64), "norm": norm(64), "b": nn.Linear(64, 128), "c": nn.Linear(128, 8)}
    widths = {"a": 16, "b": 64, "c": 128}
    smooth = {name: torch.rand(width) * 3 + 0.1 for name, width in widths.items()}
    fused = Fused(Network(forward, **layers), *IMAGE, smooth=smooth).check()
    assert products(fused)[1].output.rounding.smooth is not None


def test_norm_of_a_sequence_normalizes_its_channels():
    def forward(layers, x, time):
        return layers.a(layers.norm(x).transpose(1, 2))

    network = Network(forward, norm=norm(), a=nn.Linear(16, 8))
    Fused(network, 2, 16, 10).check()
    Fused(Network(forward, norm=norm(), a=nn.Linear(16, 8)), 2, 16, 16).check()


def test_norm_of_an_image_read_as_tokens():
    def forward(layers, x, time):
        tokens = layers.norm(layers.a(x)).permute(0, 2, 3, 1).reshape(2, 36, 16)
        return layers.b(tokens)

    network = Network(forward, a=conv(), norm=norm(), b=nn.Linear(16, 8))
    assert Fused(network, *IMAGE).check().names == ["Stream", "Gemm", "Moments", "Stream", "Gemm"]


def test_activation_after_activation():
    def forward(layers, x, time):
        return layers.a(F.gelu(F.silu(layers.norm(x)), approximate="tanh"))

    Fused(Network(forward, norm=norm(), a=conv()), *IMAGE).check()


@pytest.mark.parametrize("shape", [(4, 5, 16), (2, 5, 2, 16), (20, 16)])
def test_activation_read_in_another_shape(shape):
    def forward(layers, x, time):
        return layers.a(F.silu(x).reshape(shape))

    Fused(Network(forward, a=nn.Linear(16, 8)), *TOKENS).check()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.transpose(1, 2),
        lambda x: x.flip(1),
        lambda x: x[:, :, :8].repeat(1, 1, 2),
        lambda x: x[:, 3:],
        lambda x: x[:1],
        lambda x: x.reshape(2, 16, 16).roll(1, 2),
    ],
)
@pytest.mark.parametrize("before", [lambda layers, x: x, lambda layers, x: F.silu(layers.a(x))])
def test_square_tokens_are_not_mistaken_for_their_transpose(before, change):
    def forward(layers, x, time):
        return layers.b(change(before(layers, x)))

    network = Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 8))
    if before(network.layers, torch.ones(2, 16, 16)).equal(torch.ones(2, 16, 16)):
        del network.layers["a"]
    Fused(network, 2, 16, 16).check()


# What joins the epilogue of a product


def test_a_residual_joins_the_epilogue():
    def forward(layers, x, time):
        return x + layers.b(F.silu(layers.a(x)))

    fused = Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()
    assert "add" not in fused.names
    assert [step.residual is not None for step in products(fused)] == [False, True]


def test_a_vector_for_each_sample_joins_the_epilogue():
    def forward(layers, x, time):
        vector = layers.time(x.mean((2, 3)))[:, :, None, None]
        return layers.b(F.silu(layers.norm(layers.a(x) + vector)))

    network = Network(forward, time=nn.Linear(16, 16), a=conv(), norm=norm(), b=conv())
    fused = Fused(network, *IMAGE).check()
    assert "add" not in fused.names
    assert [step.per_sample is not None for step in products(fused)].count(True) == 1


def test_scaled_residual():
    def forward(layers, x, time):
        return (x + layers.a(x)) / 2 * 0.75

    fused = Fused(Network(forward, a=conv()), *IMAGE).check()
    assert fused.names == ["Stream", "Gemm"]
    assert products(fused)[0].factor == 0.375


def test_division_by_three_stays_a_division():
    network = Network(lambda layers, x, time: layers.a(x) / 3, a=conv())
    assert "div" in " ".join(Fused(network, *IMAGE).check().names)


def test_a_product_with_two_readers_is_not_folded():
    def forward(layers, x, time):
        hidden = layers.a(x)
        return layers.b(F.silu(hidden)) + hidden

    fused = Fused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), *TOKENS).check()
    first, second = products(fused)
    assert first.output.rounding is None
    assert second.residual is not None


def test_a_product_with_one_reader_stores_the_codes_of_its_activation():
    def forward(layers, x, time):
        return layers.b(F.gelu(layers.a(x)))

    fused = Fused(Network(forward, a=nn.Linear(16, 24), b=nn.Linear(24, 16)), *TOKENS).check()
    assert fused.names == ["Stream", "Gemm", "Gemm"]
    assert products(fused)[0].output.rounding is not None


def test_a_product_read_through_two_views_is_not_folded():
    def forward(layers, x, time):
        hidden = layers.a(x)
        return layers.b(hidden) + hidden.view(2, 10, 16).transpose(1, 2).transpose(1, 2)

    fused = Fused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16)), *TOKENS).check()
    assert products(fused)[0].output.rounding is None


def test_a_product_added_to_itself():
    def forward(layers, x, time):
        hidden = layers.a(x)
        return layers.b(hidden + hidden) + hidden * hidden

    Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()


def test_two_products_added():
    def forward(layers, x, time):
        return layers.a(x) + layers.b(x)

    fused = Fused(Network(forward, a=conv(), b=conv(kernel_size=1, padding=0)), *IMAGE).check()
    assert fused.names == ["Stream", "Gemm", "Gemm"] or fused.names.count("Gemm") == 2
    assert "add" not in fused.names


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (16, 1, 1), (1, 16, 6, 6), (6,), (6, 1), (2, 1, 6, 6)]
)
@pytest.mark.parametrize("call", [torch.add, torch.mul])
def test_operands_that_broadcast(shape, call):
    def forward(layers, x, time):
        return call(layers.a(x), other(x))

    def other(x):
        return x.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)

    Fused(Network(forward, a=conv()), *IMAGE).check()


@pytest.mark.parametrize("call", [torch.add, torch.mul])
@pytest.mark.parametrize("shape", [(2, 16), (4, 1, 16), (1, 1, 16), (16,), (5, 1)])
def test_operands_of_samples_in_another_shape(shape, call):
    def forward(layers, x, time):
        rows = 2 if shape == (2, 16) else 4
        hidden = layers.a(x).reshape(rows, -1, 16)
        other = x.reshape(-1)[: torch.Size(shape).numel()].reshape(shape)
        return call(hidden, other[:, None] if shape == (2, 16) else other)

    Fused(Network(forward, a=nn.Linear(16, 16)), *TOKENS).check()


# Layer norms and gated units


def modulated(layers, x, time):
    scale, shift = layers.time(F.silu(time)).chunk(2, -1)
    return layers.a(layers.norm(x) * (1 + scale[:, None]) + shift[:, None])


def test_layer_norm_with_modulation_is_one_step():
    layers = {"time": nn.Linear(16, 32), "norm": nn.LayerNorm(16), "a": nn.Linear(16, 8)}
    fused = Fused(Network(modulated, **layers), *TOKENS).check()
    assert fused.names == ["LayerNorm", "Gemm"]
    assert outputs(fused, LayerNormStep) == [[True]]


def test_layer_norm_of_tokens_in_rows():
    def forward(layers, x, time):
        tokens = x.permute(0, 2, 3, 1)
        return layers.a(layers.norm(tokens)) + layers.norm(tokens)

    Fused(Network(forward, norm=nn.LayerNorm(16), a=nn.Linear(16, 16)), *IMAGE).check()


def test_layer_norm_flattened_into_a_layer():
    def forward(layers, x, time):
        return layers.a(layers.norm(x).flatten(1))

    Fused(Network(forward, norm=nn.LayerNorm(16), a=nn.Linear(160, 8)), *TOKENS).check()


def geglu(layers, x, time):
    hidden, gate = layers.a(x).chunk(2, -1)
    return layers.b(hidden * F.gelu(gate))


def swiglu(layers, x, time):
    hidden, gate = layers.a(x).chunk(2, -1)
    return layers.b(F.silu(gate) * hidden)


@pytest.mark.parametrize("forward", [geglu, swiglu])
@pytest.mark.parametrize("width", [64, 192])
def test_a_gated_unit_joins_the_epilogue_of_its_product(forward, width):
    layers = {"a": nn.Linear(16, 2 * width), "b": nn.Linear(width, 16)}
    smooth = {"b": torch.rand(width) + 0.5}
    fused = Fused(Network(forward, **layers), *TOKENS, smooth=smooth).check()
    assert fused.names == ["Stream", "Gemm", "Gemm"]
    assert [step.gated for step in products(fused)] == [True, False]


def test_geglu_of_a_part_of_a_panel_stores_the_codes_of_its_product():
    layers = {"a": nn.Linear(16, 48), "b": nn.Linear(24, 16)}
    fused = Fused(Network(geglu, **layers), *TOKENS).check()
    assert fused.names == ["Stream", "Gemm", "Stream", "Gemm"]
    assert outputs(fused, StreamStep) == [[True], [True]]


@pytest.mark.parametrize(
    "unit",
    [
        lambda hidden, gate: hidden * F.gelu(gate) + hidden,
        lambda hidden, gate: hidden * F.gelu(gate) + gate,
        lambda hidden, gate: hidden * F.gelu(gate) + F.gelu(gate),
        lambda hidden, gate: F.gelu(hidden) * gate,
        lambda hidden, gate: F.gelu(gate) * gate,
        lambda hidden, gate: hidden.flip(1) * F.gelu(gate),
        lambda hidden, gate: F.gelu(F.silu(gate)) * hidden,
        lambda hidden, gate: hidden * F.gelu(gate) * 0.5,
        lambda hidden, gate: hidden[:, 1:] * F.gelu(gate[:, 1:]),
        lambda hidden, gate: hidden[..., :64] * F.gelu(hidden[..., 64:]),
    ],
)
def test_what_is_not_quite_a_gated_unit(unit):
    def forward(layers, x, time):
        return layers.b(unit(*layers.a(x).chunk(2, -1)))

    width = unit(torch.ones(1, 2, 128), torch.ones(1, 2, 128)).shape[-1]
    layers = {"a": nn.Linear(16, 256), "b": nn.Linear(width, 16)}
    fused = Fused(Network(forward, **layers), *TOKENS).check()
    assert not any(step.gated for step in products(fused))


def test_a_gated_unit_with_two_readers_is_stored_for_both():
    def forward(layers, x, time):
        hidden, gate = layers.a(x).chunk(2, -1)
        unit = hidden * F.gelu(gate)
        return layers.b(unit) + layers.c(unit.flip(1))

    layers = {"a": nn.Linear(16, 256), "b": nn.Linear(128, 16), "c": nn.Linear(128, 16)}
    Fused(Network(forward, **layers), *TOKENS).check()


def test_half_of_an_activation_times_a_value():
    def forward(layers, x, time):
        hidden, gate = F.gelu(layers.a(x)).chunk(2, -1)
        return layers.b(hidden * gate)

    Fused(Network(forward, a=nn.Linear(16, 48), b=nn.Linear(24, 16)), *TOKENS).check()


def test_activation_times_its_transpose():
    def forward(layers, x, time):
        return layers.b(F.silu(layers.a(x)).transpose(1, 2) * x)

    network = Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    Fused(network, 2, 16, 16).check()
