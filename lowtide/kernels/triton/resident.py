"""The weight of a packed layer in the order of the Triton kernels, at 8, 4 or 2 bits a value.

Rows are output channels; k runs over taps, then channels, padded to whole runs. Rows of one width
lie together as a segment, which one launch computes. Layers whose channels have their own bits have
up to three segments, and each row says to which output channel it belongs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowtide.formats import Mixed, pack, pack_mixed
from lowtide.kernels.integers import Rows, integer_weight, rows_of_grid
from lowtide.kernels.ops import Spec, unpack_codes

RUN = 32  # values of k that one field of the bytes of a run holds


@dataclass(frozen=True)
class Segment:
    """Rows of one width. `per`: values in a byte.

    data: (rows, bytes); zero: what to take from a value, (rows,) int32, or None; total: the sum of
    (value - zero) of each row; scale: (rows,); place: the output channel of each row, or None.
    """

    per: int
    data: Tensor
    zero: Tensor | None
    total: Tensor
    scale: Tensor
    place: Tensor | None

    @property
    def run(self) -> int:
        """Values of k that lie in one run of bytes."""
        return RUN * self.per


@dataclass(frozen=True)
class ResidentWeight:
    """All segments of a layer. `room`: the channels of a tap, with the padding."""

    rows: int
    channels: int
    taps: int
    room: int
    segments: tuple[Segment, ...]

    @property
    def k(self) -> int:
        return self.taps * self.room

    @property
    def nbytes(self) -> int:
        return sum(segment.data.nbytes for segment in self.segments)


def resident_weight(
    packed: Tensor, grid: list[Tensor], spec: Spec, channels: int, taps: int
) -> ResidentWeight:
    """A layer's codes in the order of the kernels, on the device of the codes."""
    rows = rows_of_grid(grid, spec)
    exact = integer_weight(unpack_codes(packed, spec), rows, taps).values()
    widths = torch.tensor([values_in_byte(bits, rows) for bits in rows.bits.tolist()])
    step = RUN * max(2, int(widths.max()))
    room = -(-channels // step) * step
    parts = [(per, torch.nonzero(widths == per).flatten()) for per in widths.unique().tolist()]
    segments = [
        _segment(per, which.to(exact.device), exact, rows, room - channels) for per, which in parts
    ]
    if len(segments) == 1:
        segments = [replace(segments[0], place=None)]
    return ResidentWeight(len(exact), channels, taps, room, tuple(segments))


def _segment(per: int, which: Tensor, exact: Tensor, rows: Rows, missing: int) -> Segment:
    """Some rows at `per` values a byte. `missing`: channels that a tap is padded by."""
    values = exact[which]
    total = values.sum((1, 2), dtype=torch.int32)
    zero = rows.zero[which]
    if per > 1:
        fields = (values + zero.reshape(-1, 1, 1)).to(torch.uint8)
        data = _bytes_of_fields(torch.nn.functional.pad(fields, (0, missing)), per)
    else:
        data = torch.nn.functional.pad(values, (0, missing)).flatten(1)
    place = which.to(torch.int32)
    zeros = zero if per > 1 else None
    return Segment(per, data.contiguous(), zeros, total, rows.scale[which], place)


def in_one_buffer(weight: ResidentWeight) -> tuple[ResidentWeight, Tensor]:
    """The same weight, with the data of all segments in one tensor of bytes, which comes second."""
    parts = [segment.data.view(torch.uint8).flatten() for segment in weight.segments]
    buffer = torch.cat(parts)
    places = buffer.split([len(part) for part in parts])
    segments = [
        replace(segment, data=place.view(segment.data.dtype).view(segment.data.shape))
        for segment, place in zip(weight.segments, places, strict=True)
    ]
    return replace(weight, segments=tuple(segments)), buffer


def values_in_byte(bits: int, rows: Rows) -> int:
    """How many values of a row share a byte. Groups with a factor of their own need int8."""
    if rows.factor is not None or bits > 4:
        return 1
    return 2 if bits > 2 else 4


def _bytes_of_fields(fields: Tensor, per: int) -> Tensor:
    """Byte j of a run holds the fields j, j + 32, ... of 32 * per values, the first one lowest."""
    runs = fields.reshape(len(fields), -1, per, RUN)
    parts = [runs[:, :, field] << (field * (8 // per)) for field in range(per)]
    return torch.stack(parts).sum(0, dtype=torch.uint8).flatten(1)


def _fields_of_bytes(data: Tensor, per: int) -> Tensor:
    """The inverse of _bytes_of_fields: (rows, k)."""
    runs = data.reshape(len(data), -1, 1, RUN)
    parts = [(runs >> (field * (8 // per))) & (2 ** (8 // per) - 1) for field in range(per)]
    return torch.cat(parts, 2).flatten(1)


def checkpoint_codes(weight: ResidentWeight, grid: list[Tensor], spec: Spec) -> Tensor:
    """The packed codes in the order of the checkpoint: the inverse of resident_weight."""
    rows = rows_of_grid(grid, spec)
    size = (weight.rows, weight.taps, weight.channels)
    codes = torch.empty(size, dtype=torch.uint8, device=rows.zero.device)
    every = torch.arange(weight.rows, device=rows.zero.device)
    for segment in weight.segments:
        which = every if segment.place is None else segment.place.long()
        flat = segment.data if segment.per == 1 else _fields_of_bytes(segment.data, segment.per)
        values = flat.reshape(len(which), weight.taps, weight.room)[:, :, : weight.channels]
        codes[which] = _codes(values, segment, rows, which)
    flat = codes.transpose(1, 2).flatten(1)
    if isinstance(spec.weight, Mixed):
        return pack_mixed(flat, spec.weight.bits)
    return pack(flat, spec.weight.bits)


def _codes(values: Tensor, segment: Segment, rows: Rows, which: Tensor) -> Tensor:
    """The codes of some rows, from what a segment holds: rows x taps x channels."""
    whole = values.to(torch.int32)
    if segment.per == 1:
        if rows.factor is not None:
            _, taps, channels = values.shape
            factors = rows.factor[which][:, rows.groups(channels, taps)]
            whole = torch.div(whole, factors, rounding_mode="trunc")
        whole = whole + rows.zero[which].reshape(-1, 1, 1)
    return (whole >> rows.doubled[which].to(torch.int32).reshape(-1, 1, 1)).to(torch.uint8)
