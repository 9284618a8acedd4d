"""Calls that write in place: a program follows them, or the network runs layer by layer."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from fused_networks import IMAGE, TOKENS, Fused, Network, conv, needs_library
from torch import Tensor, nn

from lowtide import runtime

pytestmark = needs_library


def check_refused(network: Network, shape: tuple[int, ...], reason: str) -> None:
    """The network runs plain, says why at the first call, and does not record again."""
    fused = Fused(network, *shape)
    with runtime.plain(fused.model):
        expected = fused.answers()
    with pytest.warns(UserWarning, match=f"{type(network).__name__} runs layer by layer: {reason}"):
        found = fused.answers()
    assert all(map(torch.equal, found, expected))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(torch.equal, fused.answers(), expected))
    assert runtime.explain(fused.model) == {}


# Followed


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.mul_(2),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.silu(x, inplace=True),
        lambda x: torch.relu_(x),
        lambda x: x[:, :4].add_(1),
        lambda x: x.transpose(2, 3).add_(x.sum()),
        lambda x: x.reshape(2, 16, 36).add_(1),
        lambda x: x.view(2, 16, 36).add_(1),
        lambda x: x.permute(0, 2, 3, 1).reshape(2, 36, 16).add_(1),
        lambda x: torch.add(x, 1, out=x.reshape(2, 16, 36).view(2, 16, 6, 6)),
        lambda x: x.__setitem__((slice(None), 0), 3.0),
        lambda x: torch.mul(x, 2, out=x),
        lambda x: torch.clamp(x, -1, 1, out=x),
        lambda x: torch._foreach_mul_([x, x[:, :4]], 0.5),
        lambda x: x.copy_(x.flip(0)),
        lambda x: x.data.add_(1),
    ],
)
@pytest.mark.parametrize("before", [lambda layers, x: layers.a(x), lambda layers, x: F.silu(x)])
def test_codes_of_a_value_that_was_written_into(write, before):
    def forward(layers, x, time):
        hidden = before(layers, x)
        first = layers.b(hidden)
        write(hidden)
        return first + layers.b(hidden) + hidden

    network = Network(forward, a=conv(), b=conv())
    if before(network.layers, torch.ones(IMAGE)).equal(F.silu(torch.ones(IMAGE))):
        del network.layers["a"]
    Fused(network, *IMAGE).check()


def test_the_sample_is_left_as_it_was():
    def forward(layers, x, time):
        hidden = layers.a(x)
        hidden += x
        x = x * 2
        return layers.b(hidden) + x

    fused = Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()
    before = fused.samples[0].clone()
    fused.answers()
    assert torch.equal(fused.samples[0], before)


def test_both_results_of_a_call_with_out():
    def forward(layers, x, time):
        hidden = layers.a(x)
        values = torch.empty_like(hidden)
        places = torch.empty(hidden.shape, dtype=torch.int64, device=hidden.device)
        torch.sort(hidden, dim=1, out=(values, places))
        return layers.b(values) + places

    Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()


def test_a_mask_that_is_written_into():
    """`|=` has no underscore at the end of its name."""

    def forward(layers, x, time):
        hidden = layers.a(x)
        mask = hidden > 1
        mask |= hidden < -0.5
        return layers.b(hidden * mask)

    Fused(Network(forward, a=conv(), b=conv()), *IMAGE).check()


def test_a_reshape_that_is_the_only_name_of_its_value():
    def forward(layers, x, time):
        tokens = layers.a(x).reshape(2, 16, 36)
        tokens.add_(1)
        return layers.b(tokens.transpose(1, 2))

    Fused(Network(forward, a=conv(), b=nn.Linear(16, 8)), *IMAGE).check()


def test_a_write_after_values_were_joined():
    """A layer on both reads them as they were when they were joined."""

    def forward(layers, x, time):
        hidden = layers.a(x)
        both = torch.cat([hidden, x], 1)
        first = layers.b(both)
        hidden.add_(1)
        return first + layers.c(both) + hidden

    network = Network(forward, a=conv(), b=conv(32), c=conv(32))
    Fused(network, *IMAGE, smooth={"c": torch.rand(32) + 0.5}).check()


def test_a_write_in_inference_mode():
    def forward(layers, x, time):
        hidden = layers.a(x)
        hidden += 1
        return layers.b(hidden)

    fused = Fused(Network(forward, a=conv(), b=conv()), *IMAGE)
    with torch.inference_mode():
        fused.check()
    fused.check()


# Refused


@pytest.mark.parametrize(
    "write",
    [
        # A view in the forward pass; here, where channels lie side by side, a copy.
        lambda x: x.flatten(1).mul_(0.5),
        lambda x: x.reshape(-1)[:100].zero_(),
        lambda x: torch.add(x.flatten(1), 1, out=x.view(2, 576)),
        # The other way round.
        lambda x: x.permute(0, 2, 3, 1).contiguous().view(2, 36, 16).mul_(2),
        lambda x: x.permute(0, 2, 3, 1).reshape(2, 576).add_(1),
    ],
)
def test_a_reshape_that_is_written_into(write):
    def forward(layers, x, time):
        hidden = layers.a(x)
        write(hidden)
        return layers.b(hidden) + hidden

    reason = r"\w+_?_? writes into a value that shares memory with another one\."
    check_refused(Network(forward, a=conv(), b=conv()), IMAGE, reason)


def test_a_value_whose_reshape_is_read_later():
    def forward(layers, x, time):
        hidden = layers.a(x)
        flat = hidden.flatten(1)
        hidden.add_(1)
        return layers.b(flat) + hidden.mean((2, 3))

    reason = "add_ writes into a value that shares memory with another one"
    check_refused(Network(forward, a=conv(), b=nn.Linear(576, 16)), IMAGE, reason)


def test_a_value_times_one_is_another_value():
    def forward(layers, x, time):
        hidden = layers.a(x)
        other = hidden * 1
        other.add_(1)
        return layers.b(hidden) + other

    reason = "add_ writes into a value that shares memory with another one"
    check_refused(Network(forward, a=conv(), b=conv()), IMAGE, reason)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.squeeze_(1),
        lambda x: x.unsqueeze_(0).squeeze_(0),
        lambda x: x.transpose_(1, 2).transpose_(1, 2),
        lambda x: x.resize_(2, 16),
        lambda x: setattr(x, "data", x * 2),
    ],
)
def test_a_shape_that_is_changed_in_place(write):
    def forward(layers, x, time):
        hidden = layers.a(x.mean(1, keepdim=True))
        write(hidden)
        return layers.b(hidden.reshape(2, 16))

    reason = r"\w+ changes the shape of a value in place"
    check_refused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 8)), TOKENS, reason)


def test_a_result_beside_the_written_value():
    def forward(layers, x, time):
        hidden = layers.a(x)
        places = torch.empty(10, dtype=torch.int64, device=hidden.device)
        values = torch.sort(hidden[0, :, 0], out=(torch.empty_like(hidden[0, :, 0]), places))[0]
        hidden.add_(places[:, None])
        return layers.b(hidden + values[:, None])

    Fused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 8)), *TOKENS).check()


@pytest.mark.parametrize(
    "part", [lambda count: count, lambda count: count[0], lambda count: count[:1]]
)
def test_a_buffer_that_is_written_into(part):
    class Counting(Network):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            part(self.count).add_(sample.mean())
            return self.function(self.layers, sample, None) * 0

    network = Counting(lambda layers, x, time: layers.a(x), a=nn.Linear(16, 8))
    network.register_buffer("count", torch.zeros(1))
    check_refused(network, TOKENS, r"\w+ writes into a parameter or a buffer")


def test_an_input_that_is_written_into():
    def forward(layers, x, time):
        x.mul_(0.5)
        return layers.a(x)

    check_refused(Network(forward, a=nn.Linear(16, 8)), TOKENS, "mul_ writes into an input")


def test_features_of_the_timestep_that_the_sample_is_added_to():
    def forward(layers, x, time):
        emb = layers.time(time)
        part = emb[:, :4]
        part.add_(x.mean())
        return layers.a(x) + layers.b(emb)

    layers = {"time": nn.Linear(16, 16), "a": nn.Linear(16, 8), "b": nn.Linear(16, 8)}
    reason = "add_ writes into a value that is kept between calls"
    check_refused(Network(forward, **layers), TOKENS, reason)


def test_memory_that_is_read_in_its_own_order():
    def forward(layers, x, time):
        return layers.b(torch.as_strided(layers.a(x), (2, 16), (576, 36)))

    reason = "as_strided reads memory in the order that it has layer by layer"
    check_refused(Network(forward, a=conv(), b=nn.Linear(16, 8)), IMAGE, reason)
