"""Canonical bit packing: codes of 1 to 8 bits laid end to end, lowest bit first, each row padded to a byte.

This is the order on disk, the same for every device; kernels that want another order repack when they load.
"""

import torch
from torch import Tensor


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes that one row takes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """rows x columns of uint8 codes -> rows x packed_bytes."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.contiguous()
    ones = (
        codes.unsqueeze(-1)
        .bitwise_right_shift(shifts(bits, codes))
        .bitwise_and_(1)
        .reshape(rows, columns * bits)
    )
    ones = torch.nn.functional.pad(ones, (0, -columns * bits % 8)).reshape(rows, -1, 8)
    return ones.bitwise_left_shift_(shifts(8, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :columns].contiguous()
    ones = packed.unsqueeze(-1).bitwise_right_shift(shifts(8, packed)).bitwise_and_(1).flatten(1)
    ones = ones[:, : columns * bits].reshape(packed.shape[0], columns, bits)
    return ones.bitwise_left_shift(shifts(bits, packed)).sum(-1, dtype=torch.uint8)


def shifts(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def pack_mixed(codes: Tensor, bits: tuple[int, ...]) -> Tensor:
    """One bit-width per row -> a flat run of bytes, rows in order, each padded to a byte."""
    packed: list[Tensor] = [codes[:0].flatten()] * len(bits)
    for width, rows in rows_by_width(bits).items():
        for row, line in zip(rows, pack(codes[rows], width), strict=True):
            packed[row] = line
    return torch.cat(packed)


def unpack_mixed(packed: Tensor, bits: tuple[int, ...], columns: int) -> Tensor:
    """The inverse of pack_mixed."""
    lines = packed.split([packed_bytes(columns, width) for width in bits])
    codes = packed.new_empty(len(bits), columns)
    for width, rows in rows_by_width(bits).items():
        codes[rows] = unpack(torch.stack([lines[row] for row in rows]), width, columns)
    return codes


def rows_by_width(bits: tuple[int, ...]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for row, width in enumerate(bits):
        groups.setdefault(width, []).append(row)
    return groups
