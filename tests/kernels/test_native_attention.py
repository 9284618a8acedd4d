"""The native attention against the plain path of lowtide/nn/attention.py, in float64.

Scores are exact. The softmax is computed in float32, so a value that lies within 1e-5 of a tie
between two codes may get the other one; every other value gets the same code. The bound of a
result is therefore what its ties may change, and 1e-6 of its terms for the float32 sums.
"""

from dataclasses import dataclass

import pytest
import torch
from native_programs import Memory, Steps, generator, pick
from torch import Tensor

from lowtide.formats import Adaptive, Affine
from lowtide.formats.affine import Grid
from lowtide.kernels.native_library import NOT_A_NUMBER, Attention, Operand

TIE = 1e-5
SHAPES = [(1, 1), (1, 3), (5, 4), (6, 5), (7, 16), (24, 17), (25, 63), (13, 64), (50, 65), (3, 130)]


@dataclass
class Inputs:
    """Operands, (batch, tokens, heads, width), and the grid of each."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_steps: Steps
    k_steps: Steps
    v_steps: Steps
    factor: float
    bias: Tensor | None = None
    given_as_codes: str = ""

    def operand(self, at: Memory, name: str) -> Operand:
        """The operand as float32, or as codes in the same order."""
        x = getattr(self, name)
        steps = getattr(self, f"{name}_steps")
        is_codes = name in self.given_as_codes
        given = steps.codes(x).to(torch.uint8) if is_codes else x
        return Operand(
            x=at(given),
            sample=given.stride(0),
            head=given.stride(2),
            token=given.stride(1),
            scale=at.number(steps.scale),
            zero=at.number(steps.zero),
            top=steps.top,
            is_codes=int(is_codes),
        )

    def codes(self, name: str) -> Tensor:
        """(code - zero) of an operand, (batch, heads, tokens, width), in float64."""
        steps = getattr(self, f"{name}_steps")
        return (steps.codes(getattr(self, name)).double() - steps.zero).transpose(1, 2)

    def scores(self) -> Tensor:
        products = self.codes("q") @ self.codes("k").transpose(-2, -1)
        scores = products * (self.q_steps.scale * self.k_steps.scale * self.factor)
        return scores if self.bias is None else scores + self.bias[..., None, :]


def attend(
    machine, inputs: Inputs, p: Steps, *, adaptive: bool = False, y_steps: Steps | None = None
) -> tuple[int, Tensor]:
    """What the kernel returns, and its result, (batch, heads, queries, width).

    With `y_steps` the result is codes.
    """
    batch, queries, heads, width = inputs.q.shape
    keys = inputs.k.shape[1]
    at = Memory()
    y = torch.full((batch, queries, heads, width), float("nan"))
    if y_steps is not None:
        y = torch.full((batch, queries, heads, width), 77, dtype=torch.uint8)
    arguments = Attention(
        q=inputs.operand(at, "q"),
        k=inputs.operand(at, "k"),
        v=inputs.operand(at, "v"),
        p_scale=at.number(p.scale),
        p_zero=at.number(p.zero),
        p_top=p.top,
        adaptive=int(adaptive),
        factor=inputs.factor,
        batch=batch,
        heads=heads,
        queries=queries,
        keys=keys,
        width=width,
        y=at(y),
        y_sample=y.stride(0),
        y_head=y.stride(2),
        y_token=y.stride(1),
    )
    if y_steps is not None:
        arguments.y_scale = at.number(y_steps.scale)
        arguments.y_zero = at.number(y_steps.zero)
        arguments.y_top = y_steps.top
    if inputs.bias is not None:
        arguments.bias = at(inputs.bias)
        arguments.bias_sample = inputs.bias.stride(0)
        arguments.bias_head = inputs.bias.stride(1)
    room = torch.empty(machine.native.attention_scratch(arguments), dtype=torch.uint8)
    arguments.scratch = at(room)
    return machine.run(arguments), y.transpose(1, 2)


def random_inputs(queries: int, keys: int, random: torch.Generator) -> Inputs:
    """Operands whose heads and tokens are interleaved in one tensor, as a fused layer has them."""
    batch = pick((1, 2), random)
    heads = pick((1, 2, 3), random)
    width = pick((1, 4, 7, 16, 40, 65, 80), random)
    fused = torch.randn(batch, max(queries, keys), heads, 3 * width, generator=random)
    q = fused[:, :queries, :, :width]
    k = fused[:, :keys, :, width : 2 * width]
    v = fused[:, :keys, :, 2 * width :]
    q_steps = Steps(0.023, 128)
    k_steps = pick((Steps(0.03, 101), Steps(0.4, 7, 15)), random)
    v_steps = pick((Steps(0.017, 140), Steps(0.9, 3, 7)), random)
    bias = torch.randn(batch, heads, keys, generator=random) if pick((0, 1), random) else None
    if bias is not None and keys > 1:
        bias[:, :, ::3] = -10000.0
        bias[:, :, 1] = -float("inf")
        bias[:, :, -1] = 0.5
    return Inputs(q, k, v, q_steps, k_steps, v_steps, 1 / width**0.5, bias)


def check(found: Tensor, inputs: Inputs, values: Tensor, jumps: Tensor) -> None:
    """`values`: the rounded softmax; `jumps`: what each value may be off, 0 where it is sure."""
    v = inputs.codes("v") * inputs.v_steps.scale
    bound = jumps @ v.abs() + 1e-6 * (values @ v.abs() + 1e-3)
    distance = (found.double() - values @ v).abs()
    assert (distance <= bound).all(), (distance - bound).max()
    # Few values are near a tie, so nearly all of the result is held to float32.
    sure = (jumps.sum(-1) == 0).double().mean()
    assert sure > 0.8


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("adaptive", [True, False])
def test_affine_softmax(machine, queries, keys, adaptive):
    random = generator(queries, keys, adaptive)
    inputs = random_inputs(queries, keys, random)
    zero = 0 if adaptive else pick((0, 3), random)
    p = Steps(1 / 200, zero, pick((15, 255), random))
    outcome, found = attend(machine, inputs, p, adaptive=adaptive)
    assert outcome == 0
    ratio = inputs.scores().softmax(-1) / p.scale
    values = (ratio.round().clamp(-zero, p.top - zero)) * p.scale
    near = ((ratio % 1 - 0.5).abs() < TIE * ratio.clamp(min=1)) & (ratio < p.top - zero)
    check(found, inputs, values, near.double() * p.scale)


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("bits", [3, 8])
def test_log2_softmax(machine, queries, keys, bits):
    random = generator(queries, keys, bits)
    inputs = random_inputs(queries, keys, random)
    peak = pick((1.0, 0.37), random)
    outcome, found = attend(machine, inputs, Steps(peak, 1, 2**bits - 1), adaptive=True)
    assert outcome == 0
    p = inputs.scores().softmax(-1)
    grid = Grid(torch.tensor(peak), torch.tensor(1.0))
    values = Adaptive(bits).decode(Adaptive(bits).encode(p, grid), grid).double()
    exponent = -torch.log2((p / peak).clamp(min=2.0**-126))
    near = ((exponent % 1 - 0.5).abs() < TIE * exponent.abs().clamp(min=1)) & (p > 1e-30)
    # The neighbour of a code is twice or half as large; 2.1 also covers the code that means zero.
    check(found, inputs, values, near * 2.1 * peak * 2.0 ** -exponent.floor())


@pytest.mark.parametrize(("queries", "keys"), SHAPES)
@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
@pytest.mark.parametrize("zero", [0, 1])
def test_codes_are_operands_and_results(machine, queries, keys, names, zero):
    """Operands that are codes already give the very same result, which can be rounded as well."""
    inputs = random_inputs(queries, keys, generator(queries, keys, names))
    p = Steps(1 / 200, zero)
    outcome, expected = attend(machine, inputs, p, adaptive=True)
    assert outcome == 0
    inputs.given_as_codes = names
    outcome, found = attend(machine, inputs, p, adaptive=True)
    assert outcome == 0
    assert torch.equal(found, expected)
    y_steps = Steps(0.011, 120)
    outcome, codes = attend(machine, inputs, p, adaptive=True, y_steps=y_steps)
    assert outcome == 0
    assert torch.equal(codes.float(), y_steps.codes(expected))


@pytest.mark.parametrize("width", [1, 5, 64, 100])
@pytest.mark.parametrize("keys", [2, 64, 70])
def test_scores_are_exact(machine, width, keys):
    """A bias that takes each exact score back leaves a uniform softmax, to the last bit."""
    random = generator(width, keys)
    q = torch.randint(-50, 206, (1, 1, 2, width), generator=random).float()
    k = torch.randint(-77, 179, (1, keys, 2, width), generator=random).float()
    v = torch.randint(-3, 253, (1, keys, 2, width), generator=random).float()
    grids = [Steps(1.0, zero) for zero in (50, 77, 3)]
    inputs = Inputs(q, k, v, *grids, factor=64.0)
    exact = inputs.scores()[:, :, 0]
    assert exact.abs().max() / 64 < 2**24
    inputs.bias = -exact.float()
    p = Steps(1 / keys, 0)
    outcome, found = attend(machine, inputs, p)
    assert outcome == 0
    expected = inputs.codes("v").sum(-2, keepdim=True) / keys
    assert torch.allclose(found.double(), expected, rtol=1e-6)


def test_plain_formats_are_the_reference() -> None:
    """`Steps` rounds like the affine format of a quantizer."""
    x = torch.randn(1000, generator=generator("format"))
    grid = Affine(8).params(x.amin(), x.amax())
    steps = Steps(float(grid.scale), float(grid.zero))
    assert torch.equal(steps.codes(x), Affine(8).encode(x, grid).float())


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_operands_that_are_not_a_number_are_reported(machine, name):
    inputs = random_inputs(9, 18, generator("nan"))
    changed = getattr(inputs, name).clone()
    changed[-1, -1, -1, -1] = float("nan")
    setattr(inputs, name, changed)
    assert attend(machine, inputs, Steps(1 / 255, 0))[0] == NOT_A_NUMBER


@pytest.mark.parametrize("keys", [1, 15, 16, 70])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_that_is_not_a_number_is_reported(machine, keys, value):
    inputs = random_inputs(7, keys, generator("bias"))
    batch, _, heads, _ = inputs.q.shape
    inputs.bias = torch.zeros(batch, heads, keys)
    inputs.bias[-1, -1, -1] = value
    assert attend(machine, inputs, Steps(1 / 255, 0))[0] == NOT_A_NUMBER


@pytest.mark.parametrize("keys", [1, 15, 16, 70])
def test_a_row_without_any_key_is_reported(machine, keys):
    inputs = random_inputs(7, keys, generator("masked"))
    batch, _, heads, _ = inputs.q.shape
    inputs.bias = torch.zeros(batch, heads, keys)
    inputs.bias[0, 0] = -float("inf")
    assert attend(machine, inputs, Steps(1 / 255, 0))[0] == NOT_A_NUMBER
