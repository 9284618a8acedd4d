"""Checksums of many tensors: the native library and its plain twin agree, and damage shows."""

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from native_programs import generator
from torch import Tensor

from lowtide.kernels import hashing, native_library
from lowtide.kernels.hashing import checksums, plain_checksum
from lowtide.kernels.native_library import Native

STRIPE = 64
BLOCK = 256 * STRIPE
SHORT = range(2 * STRIPE + 2)
# Around whole stripes and blocks, beyond what the plain twin takes at once.
LENGTHS = (*SHORT, 1000, 4095, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77, 65 * BLOCK + 9)


def contents(lengths: Iterable[int] = LENGTHS) -> list[Tensor]:
    random = generator(7)
    return [
        torch.randint(256, (length,), generator=random, dtype=torch.uint8) for length in lengths
    ]


def plain(tensors: list[Tensor], size: int = 8) -> list[bytes]:
    return [plain_checksum(tensor, size) for tensor in tensors]


def test_the_native_checksum_is_the_plain_one(forced):
    tensors = contents()
    assert checksums(tensors, 8) == plain(tensors)


def test_all_lengths_up_to_4096(native):
    whole = contents([4096])[0]
    tensors = [whole[:length] for length in range(4097)]
    assert checksums(tensors, 8) == plain(tensors)


def test_any_address(forced):
    whole = contents([5000])[0]
    tensors = [whole[start : start + 4000] for start in range(70)]
    assert checksums(tensors, 8) == plain([tensor.clone() for tensor in tensors])


def test_words_of_ones_and_of_zeros(forced):
    tensors = [torch.full((BLOCK + 40,), value, dtype=torch.uint8) for value in (0, 1, 255)]
    assert checksums(tensors, 8) == plain(tensors)


def test_checksums_do_not_change():
    """Files hold them. These bytes come from the plain twin when the format was fixed."""
    whole = (torch.arange(BLOCK + 100) * 7 % 256).to(torch.uint8)
    found = plain([whole[:0], whole[:1], whole[:64], whole[:65], whole])
    assert [each.hex() for each in found] == WRITTEN


WRITTEN = [
    "7119e613ab461590",
    "ea56a48b7e874420",
    "4954a94f069eb97e",
    "fb9608f9da557e49",
    "f93f4d458bb05e04",
]


@pytest.mark.parametrize("length", [1, 7, 64, 100, 200])
def test_each_flipped_bit_shows(length):
    whole = contents([length])[0]
    changed = [whole.clone() for _ in range(8 * length)]
    for bit, each in enumerate(changed):
        each[bit // 8] ^= 1 << bit % 8
    assert len(set(checksums([whole, *changed], 5))) == 8 * length + 1


@pytest.mark.parametrize("value", [0, 255])
def test_each_flipped_bit_of_equal_bytes_shows(value):
    """A word of zeros, or one that is the key, has no product."""
    whole = torch.full((BLOCK + STRIPE,), value, dtype=torch.uint8)
    found = set(checksums([whole], 5))
    for byte in range(0, len(whole), 61):
        for bit in range(8):
            whole[byte] ^= 1 << bit
            found |= set(checksums([whole], 5))
            whole[byte] ^= 1 << bit
    assert len(found) == 8 * len(range(0, len(whole), 61)) + 1


def test_each_flipped_bit_of_the_keys_shows():
    """A message of the very keys makes all products zero; the sums still tell."""
    whole = torch.from_numpy(hashing._BLOCK_KEYS[:4].view(np.uint8).flatten().copy())
    changed = [whole.clone() for _ in range(8 * len(whole))]
    for bit, each in enumerate(changed):
        each[bit // 8] ^= 1 << bit % 8
    assert checksums([whole], 5)[0] not in checksums(changed, 5)


@pytest.mark.parametrize("size", [1, 4, 8, STRIPE, 1024, BLOCK])
def test_pieces_that_change_places_show(size):
    pieces = contents([16 * size])[0].reshape(16, size)
    found = set(checksums([pieces], 5))
    count = 1
    for first in range(16):
        for second in range(first):
            if torch.equal(pieces[first], pieces[second]):
                continue
            order = list(range(16))
            order[first] = second
            order[second] = first
            found |= set(checksums([pieces[order]], 5))
            count += 1
    assert len(found) == count


def test_words_of_one_lane_that_change_places_show():
    """Their sum is the same; the keys of their products differ in both halves."""
    keys = hashing._BLOCK_KEYS
    for half in (keys >> np.uint64(32), keys & np.uint64(0xFFFFFFFF)):
        assert all(len(np.unique(lane)) == len(lane) for lane in half.T)
    words = torch.zeros(256, 8, dtype=torch.int64)
    found = []
    for stripe in range(256):
        words[stripe, 3] = 1
        found += checksums([words], 5)
        words[stripe, 3] = 0
    assert len(set(found)) == 256


@pytest.mark.parametrize("fill", [0, 1, 255])
def test_each_length_of_equal_bytes_shows(fill):
    """Appended zeros and truncations."""
    whole = torch.full((BLOCK + 300,), fill, dtype=torch.uint8)
    lengths = [*range(600), *range(BLOCK - 300, BLOCK + 301)]
    assert len(set(checksums([whole[:length] for length in lengths], 5))) == len(lengths)


def test_small_messages_collide_no_more_than_by_chance():
    """Whole checksums differ. Three bytes of them can be equal.

    Among 100,000 random numbers of 3 bytes, 297 equal an earlier one, with a deviation of 17.
    """
    count = 100_000
    counters = torch.arange(count, dtype=torch.int64)
    random = torch.randint(2**60, (count,), generator=generator(3))
    for messages in (counters, counters << 32, random):
        found = checksums(list(messages.unbind()), 8)
        assert len(set(found)) == len(set(messages.tolist()))
        for start in (0, 2, 5):
            pairs = count - len({each[start : start + 3] for each in found})
            assert abs(pairs - 297) < 5 * 17


def test_the_plain_twin_answers_where_there_is_no_library(monkeypatch):
    monkeypatch.setattr(native_library, "native", lambda: Native(None, "not built"))
    tensors = contents()
    assert checksums(tensors, 5) == plain(tensors, 5)
