"""Models in half precision: a program computes them in float32, and answers in their own type.

The plain twin is the model in float32 whose parameters are those of the half model. From it, a
program differs by the last rounding of its answer. The layers one by one round to half precision
after every call, so they are farther from the twin, and a program is as far from them.
"""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from fused_networks import (
    IMAGE,
    ONE_ROUNDING_APART,
    TOKENS,
    Fused,
    Network,
    answers,
    distance,
    needs_library,
)
from test_fused import Calls, answer
from torch import Tensor, nn

import lowtide
from lowtide import runtime, sampling
from lowtide.runtime import half

pytestmark = needs_library
HALVES = [torch.bfloat16, torch.float16]
# Two values around a middle of the type may round to neighbours, a unit of the last digit apart.
LAST_DIGIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
BFLOAT16_APART = 0.1


def in_float32(model: nn.Module) -> nn.Module:
    """The same parameters in float32, layer by layer."""
    twin = copy.deepcopy(model)
    runtime.unfuse(twin)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            # diffusers lets nobody cast a quantized model.
            parameter.data = parameter.data.float()
    return twin


def check_half(fused: Fused, dtype: torch.dtype) -> Fused:
    """The answers are those of the twin in float32, rounded once to the type."""
    fused.cast(dtype)
    twin = in_float32(fused.model)
    expected = answers(twin, [sample.float() for sample in fused.samples])
    found = fused.answers()
    assert runtime.explain(fused.model), "it ran layer by layer"
    with runtime.plain(fused.model):
        plain = fused.answers()
    assert [(each.dtype, each.shape) for each in found] == [
        (each.dtype, each.shape) for each in plain
    ]
    distances = [distance(one.float(), two) for one, two in zip(found, expected, strict=True)]
    assert min(distances) < LAST_DIGIT[dtype], distances
    assert max(distances) < ONE_ROUNDING_APART, distances
    return fused


def block(layers, x: Tensor, time: Tensor) -> Tensor:
    """A first layer and an embedding in float, a norm, a residual, and an answer through a cast."""
    emb = layers.time(F.silu(time.to(x.dtype)))
    hidden = layers.first(x) + emb[:, :, None, None]
    hidden = hidden + layers.b(F.silu(layers.norm(layers.a(hidden))))
    return (layers.out(hidden.permute(0, 2, 3, 1)).float() * layers.gain).to(x.dtype)


class Gained(Network):
    """A network with a parameter of its own."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__(forward, **layers)
        self.layers.gain = nn.Parameter(torch.rand(8) + 0.5)


def a_block() -> Network:
    conv = {"kernel_size": 3, "padding": 1}
    layers = {
        "time": nn.Linear(16, 16),
        "first": nn.Conv2d(16, 16, **conv),
        "norm": nn.GroupNorm(4, 16),
        "a": nn.Conv2d(16, 16, **conv),
        "b": nn.Conv2d(16, 16, **conv),
        "out": nn.Linear(16, 8),
    }
    nn.init.normal_(layers["norm"].weight, 1, 0.3)
    return Gained(block, **layers)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_program_answers_as_float32_does(dtype):
    fused = check_half(Fused(a_block(), *IMAGE), dtype)
    in_single = Fused(a_block(), *IMAGE).check()
    assert fused.names == in_single.names


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(dtype=x.dtype),
        lambda x: x.float().softmax(-1).type_as(x),
        lambda x: x + torch.ones(16, dtype=x.dtype, device=x.device),
        lambda x: x + torch.arange(16, device=x.device),
        lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
        lambda x: x + x.new_full((16,), 0.5),
        lambda x: x.masked_fill(x < 0, -3.0),
    ],
)
def test_types_inside_the_forward_pass(dtype, change):
    def forward(layers, x, time):
        return layers.b(change(layers.a(x)).to(x.dtype))

    check_half(Fused(Network(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 8)), *TOKENS), dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_float_layer_and_a_module_of_half_precision(dtype):
    """A layer that is not quantized, and one that has to see its own type."""

    def forward(layers, x, time):
        return layers.b(layers.plain(layers.a(x)))

    layers = {"a": nn.Linear(16, 16), "plain": nn.Linear(16, 16), "b": nn.Linear(16, 8)}
    fused = Fused(Network(forward, **layers), *TOKENS)
    plain = nn.Linear(16, 16)
    fused.model.layers.plain = plain
    check_half(fused, dtype)
    assert fused.model.layers.plain.weight.dtype == dtype


@torch.no_grad()
def test_a_module_runs_in_its_own_type_on_float32():
    layer = nn.Linear(4, 4).bfloat16()
    x = torch.randn(3, 4)
    found = half.InItsOwnType(layer, torch.bfloat16)(x)
    assert torch.equal(found, layer(x.bfloat16()).float())
    assert found.dtype == torch.float32


def test_several_answers_keep_their_types():
    class Several(Network):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, ...]:
            hidden = self.layers.a(sample)
            return hidden, hidden.float().mean(-1), hidden > 0

    fused = Fused(Several(None, a=nn.Linear(16, 8)), *TOKENS).cast(torch.bfloat16)
    found = fused.answers()[0]
    with runtime.plain(fused.model):
        expected = fused.answers()[0]
    assert runtime.explain(fused.model)
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert [each.dtype for each in found] == [torch.bfloat16, torch.float32, torch.bool]


def test_a_cast_is_seen():
    fused = Fused(a_block(), *IMAGE).check()
    first = fused.answers()[0]
    check_half(fused, torch.bfloat16)
    fused.cast(torch.float32).check()
    assert distance(fused.answers()[0], first) > 1e-4  # its parameters were rounded


def test_a_type_without_a_program():
    fused = Fused(a_block(), *IMAGE).cast(torch.float64)
    with pytest.warns(UserWarning, match="layer by layer: a float layer is in float64"):
        found = fused.answers()
    with runtime.plain(fused.model):
        assert all(map(torch.equal, found, fused.answers()))


# Pipelines


@pytest.mark.parametrize(
    ("name", "method"),
    [("ddim", "minmax"), ("ddim", "temporal_cache"), ("dit", "best"), ("sd", "tfmq"),
     ("sdxl", "mpq"), ("pixart", "minmax"), ("sd3", "tcaq"), ("flux", "minmax")],
)  # fmt: skip
def test_a_pipeline_in_bfloat16(name, method, tmp_path):
    """As near to the model in float32 as the last digit, and to plain bfloat16 as that is to it."""
    calls = Calls(name, tmp_path, method).draw_one_by_one()
    lowtide.save(calls.pipe, tmp_path / "packed")
    model = sampling.denoiser(lowtide.load(tmp_path / "packed", dtype=torch.bfloat16))
    calls.model = model
    twin = in_float32(model)
    calls.calls = [_cast(call, torch.bfloat16) for call in calls.calls]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = calls.answers()
    assert runtime.explain(model)["native"] > 30
    plain = calls.plain_answers()
    singles = [_cast(call, torch.float32) for call in calls.calls]
    with torch.no_grad():
        expected = [answer(twin(*args, **kwargs)) for args, kwargs in singles]
    assert {each.dtype for each in found} == {each.dtype for each in plain} == {torch.bfloat16}
    distances = [distance(one.float(), two) for one, two in zip(found, expected, strict=True)]
    assert min(distances) < LAST_DIGIT[torch.bfloat16], distances
    assert max(distances) < ONE_ROUNDING_APART, distances
    errors = [distance(one.float(), two) for one, two in zip(plain, expected, strict=True)]
    apart = [distance(one.float(), two.float()) for one, two in zip(found, plain, strict=True)]
    assert max(apart) < 1.1 * max(errors) + LAST_DIGIT[torch.bfloat16], (apart, errors)
    assert max(apart) < BFLOAT16_APART, apart


def _cast(call, dtype: torch.dtype):
    """A call with its sample and conditions in this type; timesteps stay as they are."""
    args, kwargs = call

    def cast(leaf):
        is_half = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1
        return leaf.to(dtype) if is_half else leaf

    return half.mapped(args, cast), half.mapped(kwargs, cast)
