"""Hashes of many tensors by the native library: those of Python's own, byte for byte."""

import hashlib

import pytest
import torch
from native_programs import generator

from lowtide.kernels import native_library
from lowtide.kernels.hashing import hashes
from lowtide.kernels.native_library import Native

# Around whole blocks of 128 bytes, and more messages than lanes.
LENGTHS = (0, 1, 5, 127, 128, 129, 255, 256, 257, 1000, 4096, 100_003, *range(40), 0)


def contents(count: int = len(LENGTHS)) -> list[torch.Tensor]:
    random = generator(count)
    return [
        torch.randint(256, (length,), generator=random, dtype=torch.uint8)
        for length in LENGTHS[:count]
    ]


def expected(tensors: list[torch.Tensor], size: int) -> list[bytes]:
    return [
        hashlib.blake2b(bytes(tensor.tolist()), digest_size=size).digest() for tensor in tensors
    ]


@pytest.mark.parametrize("size", range(1, 9))
def test_hashes_are_blake2b(forced, size):
    tensors = contents()
    assert hashes(tensors, size) == expected(tensors, size)


@pytest.mark.parametrize("count", range(10))
def test_any_number_of_messages(forced, count):
    tensors = contents(count)
    assert hashes(tensors, 5) == expected(tensors, 5)


def test_long_messages_beside_short_ones(forced):
    tensors = [torch.arange(3 * 2**20 + 77, dtype=torch.int32).view(torch.uint8), *contents(12)]
    single = hashlib.blake2b(tensors[0].numpy(), digest_size=8).digest()
    assert hashes(tensors, 8) == [single, *expected(tensors[1:], 8)]


def test_bytes_are_those_of_the_values(forced):
    values = torch.randn(7, 12, generator=generator())
    tensors = [values, values.T, values[:, 3:5], values[2, 3], values.bool(), values[:0]]
    plain = [tensor.contiguous().numpy().tobytes() for tensor in tensors]
    found = hashes(tensors, 5)
    assert found == [hashlib.blake2b(each, digest_size=5).digest() for each in plain]


def test_python_hashes_where_there_is_no_library(monkeypatch):
    monkeypatch.setattr(native_library, "native", lambda: Native(None, "not built"))
    tensors = contents()
    assert hashes(tensors, 5) == expected(tensors, 5)
