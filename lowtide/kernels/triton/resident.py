"""The weight of a packed layer in the order of the Triton kernels, at 8, 4 or 2 bits a value.

Rows are output channels; k runs over taps, then channels, padded to whole runs. Rows of one width
lie together as a segment, which one launch computes. Layers whose channels have their own bits have
up to three segments, and each row says to which output channel it belongs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowtide.formats import Mixed, pack, pack_mixed
from lowtide.kernels.integers import Rows, rows_of_grid
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
    rows = rows_of_grid([table.cpu() for table in grid], spec)
    codes = unpack_codes(packed, spec).reshape(-1, channels, taps).transpose(1, 2)
    widths = torch.tensor([values_in_byte(bits, rows) for bits in rows.bits.tolist()])
    step = RUN * max(2, int(widths.max()))
    room = -(-channels // step) * step
    padding = (0, room - channels)
    parts = [(per, torch.nonzero(widths == per).flatten()) for per in widths.unique().tolist()]
    segments: list[Segment] = []
    for per, which in parts:
        exact = _integers(codes, rows, which)
        zero = rows.zero[which].to(codes.device)
        total = exact.sum((1, 2), dtype=torch.int32)
        if per > 1:
            fields = (exact + zero.reshape(-1, 1, 1)).to(torch.uint8)
            data = _bytes_of_fields(torch.nn.functional.pad(fields, padding), per)
        else:
            data = torch.nn.functional.pad(exact, padding).to(torch.int8).flatten(1)
        place = which.to(torch.int32).to(codes.device) if len(parts) > 1 else None
        scale = rows.scale[which].to(codes.device)
        fields = (data.contiguous(), zero if per > 1 else None, total, scale, place)
        segments.append(Segment(per, *fields))
    return ResidentWeight(len(codes), channels, taps, room, tuple(segments))


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


def _integers(codes: Tensor, rows: Rows, which: Tensor) -> Tensor:
    """The integers that these rows stand for: int16, rows x taps x channels."""
    at = which.to(codes.device)
    shape = (-1, 1, 1)
    doubled = rows.doubled[which].to(codes.device, torch.int16).reshape(shape)
    zero = rows.zero[which].to(codes.device, torch.int16).reshape(shape)
    exact = (codes[at].to(torch.int16) << doubled) - zero
    if rows.factor is not None:
        _, taps, channels = codes.shape
        spread = rows.factor[which].to(codes.device).repeat_interleave(rows.group, 1)
        by_tap = spread[:, : taps * channels].reshape(-1, channels, taps).transpose(1, 2)
        exact = exact * by_tap.to(torch.int16)
    return exact


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
    rows = rows_of_grid([table.cpu() for table in grid], spec)
    device = weight.segments[0].data.device
    size = (weight.rows, weight.taps, weight.channels)
    codes = torch.empty(size, dtype=torch.uint8, device=device)
    for segment in weight.segments:
        which = torch.arange(weight.rows) if segment.place is None else segment.place.cpu().long()
        flat = segment.data if segment.per == 1 else _fields_of_bytes(segment.data, segment.per)
        values = flat.reshape(len(which), weight.taps, weight.room)[:, :, : weight.channels]
        codes[which.to(device)] = _codes(values, segment, rows, which)
    flat = codes.transpose(1, 2).flatten(1)
    if isinstance(spec.weight, Mixed):
        return pack_mixed(flat, spec.weight.bits)
    return pack(flat, spec.weight.bits)


def _codes(values: Tensor, segment: Segment, rows: Rows, which: Tensor) -> Tensor:
    """The codes of some rows, from what a segment holds: rows x taps x channels."""
    shape = (-1, 1, 1)
    whole = values.to(torch.int16)
    if segment.per == 1:
        if rows.factor is not None:
            _, taps, channels = values.shape
            spread = rows.factor[which].to(values.device).repeat_interleave(rows.group, 1)
            by_tap = spread[:, : taps * channels].reshape(-1, channels, taps).transpose(1, 2)
            whole = torch.div(whole, by_tap.to(torch.int16), rounding_mode="trunc")
        whole = whole + rows.zero[which].to(values.device, torch.int16).reshape(shape)
    doubled = rows.doubled[which].to(values.device, torch.int16).reshape(shape)
    return (whole >> doubled).to(torch.uint8)
