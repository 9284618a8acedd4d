"""Hashes of many tensors: BLAKE2b of their bytes, side by side in the native library."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lowtide.kernels import native_library


def hashes(tensors: Sequence[Tensor], size: int) -> list[bytes]:
    """The hash of each tensor in `size` bytes, 8 at most."""
    contents = [_content(tensor) for tensor in tensors]
    if native_library.native().library is None:
        return [plain_hash(content, size) for content in contents]
    # The longest go first, so that all lanes and threads end at about the same time.
    order = sorted(range(len(contents)), key=lambda place: -len(contents[place]))
    data = torch.tensor([contents[place].data_ptr() for place in order], dtype=torch.int64)
    lengths = torch.tensor([len(contents[place]) for place in order], dtype=torch.int64)
    found = torch.empty(len(order), dtype=torch.int64)
    arguments = native_library.Hash(
        data=data.data_ptr(),
        bytes=lengths.data_ptr(),
        hashes=found.data_ptr(),
        count=len(order),
        size=size,
    )
    native_library.native().run_one(arguments, torch.get_num_threads())
    words = found.tolist()
    by_place = dict(zip(order, words, strict=True))
    return [
        by_place[place].to_bytes(8, "little", signed=True)[:size] for place in range(len(order))
    ]


def plain_hash(content: Tensor, size: int) -> bytes:
    """The same by Python's own library, of flat bytes."""
    return hashlib.blake2b(content.numpy().data, digest_size=size).digest()


def _content(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat. Nothing is copied if it is dense and on the CPU."""
    return tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
