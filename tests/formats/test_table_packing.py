"""Tables that are packed into one tensor are unpacked to the same bits."""

import torch

from lowtide.formats import PackedTable, pack_tables, table_words, unpack_tables

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


def test_a_cast_of_the_module_leaves_the_bits():
    module = torch.nn.Module()
    table = torch.full((3, 1), 0.1)
    module.register_buffer("grid", pack_tables([table], PLACES[:1]))
    (unpacked,) = unpack_tables(module.to(torch.bfloat16).grid, PLACES[:1])
    assert torch.equal(unpacked, table)
