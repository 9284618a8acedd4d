"""Hashes and checksums of many tensors, by the native library where there is one.

A hash is BLAKE2b of the bytes. A checksum notices damage as surely and takes one pass at the speed
of memory, but whoever wants to can make other bytes of the same checksum. `plain_checksum` says how
it is taken; kernels/native/checksum.inc is the fast twin.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowtide.kernels import native_library

_WORDS = 8  # of a stripe
_BLOCK = 256  # stripes
_AT_ONCE = 16  # blocks whose words the plain twin has in memory
_STEP = 0x9FB21C651E98DF25
_MIX = 0xD6E8FEB86659FD93
_KEYS = np.array(
    [
        0x9E3779B97F4A7C15, 0xF39CC0605CEDC834, 0x1082276BF3A27251, 0xF86C6A11D0C18E95,
        0x2767F0B153D27B7F, 0x0347045B5BF1827F, 0x01886F0928403002, 0xC1D64BA40F335E36,
    ],
    dtype=np.uint64,
)  # fmt: skip
# The key of each word of a block.
_BLOCK_KEYS = _KEYS + np.arange(_BLOCK, dtype=np.uint64)[:, None] * np.uint64(_STEP)

_Words = NDArray[np.uint64]


def hashes(tensors: Sequence[Tensor], size: int) -> list[bytes]:
    """The hash of each tensor in `size` bytes, 8 at most."""
    return _answers(tensors, size, plain_hash, partial(native_library.Hash, size=size))


def checksums(tensors: Sequence[Tensor], size: int) -> list[bytes]:
    """The checksum of each tensor, cut to `size` bytes, 8 at most."""
    return _answers(tensors, size, plain_checksum, native_library.Checksum)


def plain_hash(content: Tensor, size: int) -> bytes:
    """The same by Python's own library, of flat bytes."""
    return hashlib.blake2b(content.numpy().data, digest_size=size).digest()


def plain_checksum(content: Tensor, size: int) -> bytes:
    """The checksum of flat bytes, in numpy.

    The bytes are words of 8 in stripes of 8 words, the last one filled up with zeros. A block is
    256 stripes. Each lane of a block adds up its words, and the products of the lower and the upper
    half of word ^ key. Both sums are mixed after each block, and in the end folded into the length.
    """
    sums = np.zeros((2, _WORDS), dtype=np.uint64)
    for piece in content.split(_AT_ONCE * _BLOCK * _WORDS * 8):
        for block in _sums_of_blocks(piece):
            sums += block
            sums = (sums ^ (sums >> np.uint64(47)) ^ _KEYS) * np.uint64(_MIX)
    result = len(content) ^ _STEP
    for word in sums.T.flatten().tolist():
        result = _mixed(result ^ word)
    return result.to_bytes(8, "little")[:size]


def _sums_of_blocks(piece: Tensor) -> _Words:
    """The sums of the words and of the products in each block: blocks x 2 x 8."""
    size = _BLOCK * _WORDS * 8
    count = -(-len(piece) // size)
    filled = np.pad(piece.numpy(), (0, count * size - len(piece)))
    words = filled.view("<u8").reshape(count, _BLOCK, _WORDS)
    keyed = words ^ _BLOCK_KEYS
    products = (keyed & np.uint64(0xFFFFFFFF)) * (keyed >> np.uint64(32))
    # The zeros that fill the last stripe have products; stripes behind it have none.
    stripes = -(-len(piece) // (_WORDS * 8))
    products.reshape(-1, _WORDS)[stripes:] = 0
    return np.stack([_added_up(words), _added_up(products)], axis=1)


def _added_up(words: _Words) -> _Words:
    """The sums over the stripes of each block: halves are added, so that numpy has long rows."""
    while words.shape[1] > 1:
        half = words.shape[1] // 2
        words = words[:, :half] + words[:, half:]
    return words[:, 0]


def _mixed(word: int) -> int:
    for shift in (32, 29):
        word = (word ^ word >> shift) * _MIX % 2**64
    return word ^ word >> 32


def _content(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat. Nothing is copied if it is dense and on the CPU."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8)


def _answers(
    tensors: Sequence[Tensor],
    size: int,
    plain: Callable[[Tensor, int], bytes],
    arguments: Callable[..., native_library.Hash | native_library.Checksum],
) -> list[bytes]:
    """What the native library says of each tensor, or its plain twin where there is none."""
    contents = [_content(tensor) for tensor in tensors]
    if native_library.native().library is None:
        return [plain(content, size) for content in contents]
    # The longest go first, so that all lanes and threads end at about the same time.
    order = sorted(range(len(contents)), key=lambda place: -len(contents[place]))
    data = torch.tensor([contents[place].data_ptr() for place in order], dtype=torch.int64)
    lengths = torch.tensor([len(contents[place]) for place in order], dtype=torch.int64)
    found = torch.empty(len(order), dtype=torch.int64)
    places = (data.data_ptr(), lengths.data_ptr(), found.data_ptr(), len(order))
    native_library.native().run_one(arguments(*places), torch.get_num_threads())
    by_place = dict(zip(order, found.tolist(), strict=True))
    return [
        by_place[place].to_bytes(8, "little", signed=True)[:size] for place in range(len(order))
    ]
