"""Canonical bit packing: codes of 1 to 8 bits end to end, lowest bit first, rows padded to a byte.

This is the order on disk and is the same for every device. A kernel that needs another order
repacks when it loads.
"""

import torch
from torch import Tensor


def packed_bytes(columns: int, bits: int) -> int:
    """The number of bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes, rows x columns, into rows x packed_bytes."""
    rows, columns = codes.shape
    if bits == 8:
        return codes.contiguous()
    digits = codes.unsqueeze(-1).bitwise_right_shift(_shifts(bits, codes)).bitwise_and_(1)
    digits = digits.reshape(rows, columns * bits)
    digits = torch.nn.functional.pad(digits, (0, -columns * bits % 8)).reshape(rows, -1, 8)
    return digits.bitwise_left_shift_(_shifts(8, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of pack: uint8 codes, rows x columns."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(1)[:, :columns].contiguous()
    digits = packed.unsqueeze(-1).bitwise_right_shift(_shifts(8, packed)).bitwise_and_(1)
    digits = digits.flatten(1)[:, : columns * bits].reshape(packed.shape[0], columns, bits)
    return digits.bitwise_left_shift(_shifts(bits, packed)).sum(-1, dtype=torch.uint8)


def _shifts(count: int, like: Tensor) -> Tensor:
    return torch.arange(count, dtype=torch.uint8, device=like.device)


def pack_mixed(codes: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Pack rows with one bit-width each into a flat run of bytes, in order of the rows."""
    packed: list[Tensor] = [codes[:0].flatten()] * len(bits)
    for width, rows in _rows_by_width(bits).items():
        for row, packed_row in zip(rows, pack(codes[rows], width), strict=True):
            packed[row] = packed_row
    return torch.cat(packed)


def unpack_mixed(packed: Tensor, bits: tuple[int, ...], columns: int) -> Tensor:
    """The inverse of pack_mixed: uint8 codes, rows x columns."""
    packed_rows = packed.split([packed_bytes(columns, width) for width in bits])
    codes = packed.new_empty(len(bits), columns)
    for width, rows in _rows_by_width(bits).items():
        same_width = torch.stack([packed_rows[row] for row in rows])
        codes[rows] = unpack(same_width, width, columns)
    return codes


def _rows_by_width(bits: tuple[int, ...]) -> dict[int, list[int]]:
    groups: dict[int, list[int]] = {}
    for row, width in enumerate(bits):
        groups.setdefault(width, []).append(row)
    return groups
