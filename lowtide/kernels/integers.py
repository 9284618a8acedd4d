"""A weight as integers: int8 values times a scale of each output channel.

What the kernels multiply is an int8, (code * 2^doubled - zero) * factor, whatever the format.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.formats import Mixed, WeightFormat
from lowtide.kernels.ops import Spec, zero_point


@dataclass(frozen=True)
class Rows:
    """What turns the codes of each row into int8, and its scale.

    bits: of each row, int32; doubled: of each row, whether a code counts twice; zero: (rows,)
    int32; scale: (rows,); factor: rows x groups of `group` columns of the checkpoint, uint8, or
    None. Loading makes these for a thousand rows of each layer, so all of them are tensors.
    """

    bits: Tensor
    doubled: Tensor
    zero: Tensor
    scale: Tensor
    factor: Tensor | None = None
    group: int = 0

    @property
    def keeps_bits(self) -> bool:
        """Whether the kernels keep the bits of the checkpoint in memory; else they keep int8."""
        return int(self.bits.min()) < 8

    @property
    def fits(self) -> bool:
        """Whether every value that a code can stand for is an int8."""
        tops = (2**self.bits - 1) << self.doubled.to(torch.int32)
        factor = 1 if self.factor is None else self.factor.amax(1).to(torch.int32)
        highest = ((tops - self.zero) * factor).amax()
        lowest = (-self.zero * factor).amin()
        return int(highest) <= 127 and int(lowest) >= -128

    def groups(self, channels: int, taps: int) -> Tensor:
        """The group of each value of a row, taps x channels."""
        columns = torch.arange(channels * taps, device=self.zero.device) // self.group
        return columns.reshape(channels, taps).T


@dataclass(frozen=True)
class IntegerWeight:
    """Codes, uint8, rows x taps x channels, and what turns them into int8."""

    codes: Tensor
    rows: Rows

    @property
    def scale(self) -> Tensor:
        return self.rows.scale

    def values(self) -> Tensor:
        """int8, rows x taps x channels."""
        rows = self.rows
        whole = self.codes.to(torch.int16) << rows.doubled.to(torch.int16).reshape(-1, 1, 1)
        whole = whole - rows.zero.to(torch.int16).reshape(-1, 1, 1)
        if rows.factor is not None:
            _, taps, channels = self.codes.shape
            whole = whole * rows.factor.to(torch.int16)[:, rows.groups(channels, taps)]
        lowest, highest = (int(end) for end in whole.aminmax())
        if lowest < -128 or highest > 127:
            raise BadInput(
                f"found weights from {lowest} to {highest} steps",
                "-128 to 127, which an int8 holds",
                "run this layer on the plain operators: engine='plain'",
            )
        return whole.to(torch.int8)


def rows_of(scale: Tensor, zero: Tensor, factor: Tensor | None, format: WeightFormat) -> Rows:
    """The rows of a weight with these tables, each (rows, 1) but for the factors of groups."""
    rows = len(scale)
    if isinstance(format, Mixed):
        bits = torch.tensor(format.bits, dtype=torch.int32, device=scale.device)
    else:
        bits = torch.full((rows,), format.bits, dtype=torch.int32, device=scale.device)
    half = bits == 1
    # A symmetric channel of one bit has the values plus and minus half a scale:
    # (2 * code - 1) * (scale / 2).
    symmetric = isinstance(format, Mixed) or format.signed
    doubled = half if symmetric else torch.zeros_like(half)
    scales = torch.where(doubled, scale.flatten() / 2, scale.flatten())
    zeros = torch.where(doubled, 1.0, zero.flatten().expand(rows).float())
    factors = None if factor is None else factor.to(torch.uint8)
    fields = (zeros.to(torch.int32), scales.float().contiguous(), factors, format.group or 0)
    return Rows(bits, doubled, *fields)


def rows_of_grid(grid: list[Tensor], spec: Spec) -> Rows:
    """The rows of a weight from the tables of its layer."""
    scale, zero, factor, _ = grid
    point = zero if zero.numel() else zero_point(spec.weight, scale, factor)
    return rows_of(scale, point, factor if factor.numel() else None, spec.weight)


def integer_weight(codes: Tensor, rows: Rows, taps: int) -> IntegerWeight:
    """Codes of a layer, rows x columns in the order of the checkpoint, as integers of the kernels.

    The columns of a checkpoint are channels x taps; the kernels read taps x channels.
    """
    return IntegerWeight(codes.reshape(len(codes), -1, taps).transpose(1, 2), rows)
