"""Tables that are packed into one tensor are unpacked to the same bits."""

import pytest
import torch

from lowtide.formats import PackedTable, flat_tables, pack_tables, table_words, unpack_tables

PLACES = (
    PackedTable((3, 1), torch.float32),
    PackedTable((3, 1), torch.uint8),
    PackedTable((0,), torch.uint8),
    PackedTable((3, 7), torch.uint8),
    PackedTable((5,), torch.float32),
)


def test_bits_and_shapes_come_back():
    draw = torch.Generator().manual_seed(0)
    tables = [torch.randn(place.shape, generator=draw) for place in PLACES]
    tables = [
        table if place.dtype == torch.float32 else (table * 100).to(torch.uint8)
        for table, place in zip(tables, PLACES, strict=True)
    ]
    packed = pack_tables(tables, PLACES)
    assert packed.dtype == torch.int32
    assert len(packed) == table_words(PLACES) == 3 + 1 + 0 + 6 + 5
    for before, after in zip(tables, unpack_tables(packed, PLACES), strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)
    for before, after in zip(tables, flat_tables(packed, PLACES), strict=True):
        assert (after is None) == (before.numel() == 0)
        assert after is None or torch.equal(before.flatten(), after)


def test_a_cast_of_the_module_leaves_the_bits():
    module = torch.nn.Module()
    table = torch.full((3, 1), 0.1)
    module.register_buffer("grid", pack_tables([table], PLACES[:1]))
    (unpacked,) = unpack_tables(module.to(torch.bfloat16).grid, PLACES[:1])
    assert torch.equal(unpacked, table)


def test_tables_take_the_dtype_of_their_place():
    tables = [torch.tensor([[0.5], [1.5], [-2.0]]).double(), torch.tensor([[1], [2], [255]])]
    unpacked = unpack_tables(pack_tables(tables, PLACES[:2]), PLACES[:2])
    assert torch.equal(unpacked[0], tables[0].float())
    assert torch.equal(unpacked[1], tables[1].byte())


def test_a_table_without_a_place_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        pack_tables([torch.zeros(3, 1)] * 2, PLACES[:1])
