"""Properties of packing, formats and plans that hold for every value, found by hypothesis."""

import json

import pytest
import torch

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as draw  # noqa: E402

from lowtide.errors import BadInput  # noqa: E402
from lowtide.formats import (  # noqa: E402
    Affine,
    Log2,
    Mixed,
    format_from_json,
    format_to_json,
    pack,
    pack_mixed,
    packed_bytes,
    unpack,
    unpack_mixed,
)
from lowtide.nn.plan import CachePlan, LayerPlan, Plan, SidePlan  # noqa: E402

bits = draw.integers(1, 8)
often = settings(max_examples=100, deadline=None)
few = settings(max_examples=30, deadline=None)


def codes(rows, columns, widths, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(rows, columns, generator=generator)
    top = torch.tensor([2**width for width in widths])[:, None]
    return (drawn * top).floor().to(torch.uint8)


@often
@given(bits, draw.integers(1, 6), draw.integers(1, 40), draw.integers(0, 2**20))
def test_codes_come_back_from_their_bytes(width, rows, columns, seed):
    whole = codes(rows, columns, [width] * rows, seed)
    packed = pack(whole, width)
    assert packed.shape == (rows, packed_bytes(columns, width))
    assert torch.equal(unpack(packed, width, columns), whole)


@often
@given(draw.lists(bits, min_size=1, max_size=7), draw.integers(1, 30), draw.integers(0, 2**20))
def test_rows_of_different_bits_come_back(widths, columns, seed):
    whole = codes(len(widths), columns, widths, seed)
    packed = pack_mixed(whole, tuple(widths))
    assert torch.equal(unpack_mixed(packed, tuple(widths), columns), whole)


@often
@given(bits, draw.booleans(), draw.integers(0, 2**20), draw.floats(1e-3, 1e3))
def test_a_rounded_value_is_within_half_a_scale_and_stays(width, signed, seed, spread):
    form = Affine(width, signed=signed, axis=0)
    values = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)) * spread
    grid = form.params(*form.rows(values).aminmax(dim=1, keepdim=True))
    rounded = form.decode(form.encode(values, grid), grid)
    # One signed bit has two values, plus and minus half a scale, and zero is none of them.
    assert ((rounded - values).abs() <= 0.5001 * grid.scale).all()
    if not (signed and width == 1):
        assert torch.equal(form.decode(form.encode(rounded, grid), grid), rounded)


affine = draw.builds(
    Affine, bits, draw.booleans(), draw.sampled_from([None, 0]), draw.sampled_from([None, 16, 64])
)
mixed = draw.builds(Mixed, draw.lists(bits, min_size=1, max_size=9).map(tuple), draw.booleans())
names = draw.text(min_size=1, max_size=12)
layer = draw.builds(
    LayerPlan, draw.one_of(draw.none(), affine, mixed), draw.one_of(draw.none(), affine),
    draw.booleans(), draw.booleans(),
)  # fmt: skip
steps = draw.lists(draw.integers(0, 999), max_size=6, unique=True).map(tuple)
plans = draw.builds(
    Plan,
    layers=draw.dictionaries(names, layer, max_size=5),
    attentions=draw.dictionaries(names, draw.dictionaries(names, layer, max_size=3), max_size=3),
    timesteps=steps,
    ticks=draw.integers(1, 100),
    method=draw.text(max_size=8),
    left=draw.dictionaries(names, draw.text(max_size=5), max_size=3),
    splits=draw.dictionaries(names, draw.integers(1, 99), max_size=2),
    blank=draw.dictionaries(names, draw.integers(1, 99), max_size=2),
    cached=draw.dictionaries(names, draw.builds(CachePlan, draw.integers(1, 99), affine)),
    corrected=draw.integers(0, 99),
    sides=draw.dictionaries(names, draw.builds(SidePlan, draw.integers(1, 9), draw.booleans())),
)


@often
@given(draw.one_of(affine, mixed, draw.builds(Log2, bits)))
def test_a_format_comes_back_from_json(form):
    assert format_from_json(json.loads(json.dumps(format_to_json(form)))) == form


@few
@given(plans, draw.randoms())
def test_a_plan_comes_back_in_its_order_whatever_that_of_the_keys(plan, rng):
    data = json.loads(plan.to_json())
    for field in ("layers", "attentions", "cached"):
        keys = list(data[field])
        rng.shuffle(keys)
        data[field] = {key: data[field][key] for key in keys}
    again = Plan.from_json(json.dumps(data))
    assert again == plan
    assert list(again.layers) == list(plan.layers)
    filled = [name for name, parts in plan.attentions.items() if parts]
    assert [name for name in again.attentions if again.attentions[name]] == filled
    assert all(list(again.attentions[name]) == list(plan.attentions[name]) for name in filled)


@few
@given(plans, draw.data())
def test_a_damaged_plan_is_refused_or_read(plan, data):
    """Nothing but one sentence, whatever a field becomes."""
    fields = json.loads(plan.to_json())
    name = data.draw(draw.sampled_from(sorted(fields)))
    leaf = draw.one_of(draw.none(), draw.integers(), draw.floats(), draw.text(max_size=4))
    fields[name] = data.draw(draw.recursive(leaf, lambda each: draw.lists(each, max_size=3)))
    try:
        assert isinstance(Plan.from_json(json.dumps(fields)), Plan)
    except BadInput as error:
        assert "plan" in str(error)


def test_a_plan_before_version_five_has_the_order_of_its_keys():
    plan = Plan(layers={"b": LayerPlan(Affine(4), None), "a": LayerPlan(None, Affine(8))})
    fields = json.loads(plan.to_json())
    del fields["order"]
    assert list(Plan.from_json(json.dumps(fields)).layers) == ["b", "a"]
    fields["order"] = [0, 0]
    with pytest.raises(BadInput, match="found a plan with an order of 2 places"):
        Plan.from_json(json.dumps(fields))
