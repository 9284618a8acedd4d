"""Packing: exact sizes, exact inverses, a known byte order."""

import pytest
import torch

from lowtide.formats import pack, pack_mixed, packed_bytes, unpack, unpack_mixed


def codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(
        2**bits, (rows, columns), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits)
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 2, 3, 7, 8, 9, 64, 577])
def test_unpack_undoes_pack_in_exactly_bits_times_numel(bits, columns):
    unpacked = codes(5, columns, bits)
    packed = pack(unpacked, bits)
    assert packed.shape == (5, -(-columns * bits // 8)) == (5, packed_bytes(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), unpacked)


def test_lowest_bit_first():
    assert pack(torch.tensor([[1, 2]], dtype=torch.uint8), 4).tolist() == [[0x21]]
    assert pack(torch.tensor([[5, 6, 7]], dtype=torch.uint8), 3).tolist() == [[0b11110101, 0b1]]


def test_mixed_rows():
    bits = (1, 4, 3, 8, 4)
    unpacked = torch.stack([codes(1, 13, width)[0] for width in bits])
    packed = pack_mixed(unpacked, bits)
    assert packed.numel() == sum(-(-13 * width // 8) for width in bits)
    assert torch.equal(unpack_mixed(packed, bits, 13), unpacked)
