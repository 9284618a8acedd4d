"""The weight of a layer in the order of the native kernels: panels of 64 output channels.

A weight of 8 bits is int8. A weight of fewer bits keeps its bits: planes of 4, 2 and 1 bits, which
the kernels unpack right before they use a panel. kernels/native/gemm.inc says the order of bytes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lowtide.formats import WeightFormat
from lowtide.kernels import native_library
from lowtide.kernels.rows import Rows, rows_of

PANEL = 64
VECTOR = 16
RUN = 32  # values of k in a run of bit planes
ALIGNMENT = 64
PLANES = (8, 4, 2, 1)
_BYTES = 0x01010101


@dataclass(frozen=True)
class Panels:
    """The tensors of a native weight.

    data: bytes; panel: offset of each panel (panels,); masks: (vectors, 4); shifts: (vectors, 4,
    16); zeros: (vectors, 16); scale, sums: (columns,). `planes`: whether data is bit planes.
    `uniform`: the bits of the one plane that all columns have, or 0.
    """

    data: Tensor
    panel: Tensor
    masks: Tensor
    shifts: Tensor
    zeros: Tensor
    scale: Tensor
    sums: Tensor
    k4: int
    planes: bool
    uniform: int

    @property
    def structure(self) -> native_library.Weight:
        """The weight as the kernels take it; it points to these tensors."""
        fields = (self.data, self.panel, self.masks, self.shifts, self.zeros, self.scale, self.sums)
        addresses = [tensor.data_ptr() for tensor in fields]
        flags = (int(self.planes), self.uniform)
        return native_library.Weight(*addresses, self.columns, self.k4, *flags)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    @property
    def columns(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class IntegerWeight:
    """Codes and what turns them into int8: value = code * 2^double - zero, times the scale.

    codes: uint8, rows x taps x channels; zero: (rows,); bits: of each row; doubled: of each row,
    whether a code counts twice; factor: rows x columns in the order of the codes, or None.
    """

    codes: Tensor
    zero: Tensor
    scale: Tensor
    bits: tuple[int, ...]
    doubled: Tensor
    factor: Tensor | None = None

    def values(self) -> Tensor:
        """int8, rows x taps x channels."""
        whole = self.codes.to(torch.int16) << self.doubled.to(torch.int16).reshape(-1, 1, 1)
        whole = whole - self.zero.to(torch.int16).reshape(-1, 1, 1)
        if self.factor is not None:
            whole = whole * self.factor.to(torch.int16)
        return whole.to(torch.int8)


def integer_weight(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    factor: Tensor | None,
    format: WeightFormat,
    taps: int,
) -> IntegerWeight:
    """Codes of a layer, rows x columns in the order of the checkpoint, as integers of the kernels.

    The columns of a checkpoint are channels x taps; the kernels read taps x channels.
    """
    of_rows = rows_of(scale, zero, factor, format)
    by_tap = codes.reshape(len(codes), -1, taps).transpose(1, 2)
    factors = None
    if factor is not None:
        spread = factor.repeat_interleave(of_rows.group, 1)[:, : codes.shape[1]]
        factors = spread.reshape(len(codes), -1, taps).transpose(1, 2)
    bits = tuple(of_rows.bits.tolist())
    fields = (of_rows.zero, of_rows.scale, bits, of_rows.doubled)
    return IntegerWeight(by_tap, *fields, factors)


def empty_panels(rows: Rows, channels: int, taps: int) -> Panels:
    """Panels whose bytes and sums are not filled yet."""
    count = len(rows.bits)
    columns = -(-count // VECTOR) * VECTOR
    k4 = taps * -(-channels // 4)
    uniform = _uniform(rows.bits, rows.doubled) if rows.keeps_bits else 0
    masks, shifts = _planes_of(rows.bits, rows.doubled, columns)
    if uniform:
        masks[:, PLANES.index(uniform)] = 2**VECTOR - 1
    sizes = _plane_sizes(masks, k4) if rows.keeps_bits else 4 * k4 * torch.tensor(_widths(columns))
    return Panels(
        data=torch.empty(int(sizes.sum()), dtype=torch.uint8),
        panel=offsets(sizes),
        masks=masks,
        shifts=shifts,
        zeros=_zero_bytes(rows.zero, columns),
        scale=rows.scale,
        sums=torch.zeros(count, dtype=torch.int32),
        k4=k4,
        planes=rows.keeps_bits,
        uniform=uniform,
    )


def _plane_sizes(masks: Tensor, k4: int) -> Tensor:
    """Bytes of each panel of bit planes."""
    runs = -(-k4 * 4 // RUN)
    columns = (masks.unsqueeze(-1) >> torch.arange(VECTOR) & 1).sum(-1)
    by_vector = (columns * torch.tensor(PLANES)).sum(1) * 4 * runs
    missing = -len(by_vector) % (PANEL // VECTOR)
    return torch.nn.functional.pad(by_vector, (0, missing)).reshape(-1, PANEL // VECTOR).sum(1)


def _uniform(bits: Tensor, doubled: Tensor) -> int:
    """The bits of the only plane of all columns, or 0. The kernels double codes of one bit."""
    least, most = map(int, bits.aminmax())
    if least != most or most not in (4, 2, 1):
        return 0
    return most if most > 1 or bool(doubled.all()) else 0


def _zero_bytes(zero: Tensor, columns: int) -> Tensor:
    """Each column's zero point in each byte of a dword."""
    zeros = torch.zeros(columns, dtype=torch.int64)
    zeros[: len(zero)] = zero.to(torch.int64) * _BYTES
    return torch.where(zeros >= 2**31, zeros - 2**32, zeros).to(torch.int32)


def panels(weight: IntegerWeight) -> Panels:
    """The weight in panels, with its own bits where no group has a factor of its own."""
    rows, taps, channels = weight.codes.shape
    padded = -(-channels // 4) * 4
    k4 = taps * padded // 4
    values = weight.values()
    sums = values.sum((1, 2), dtype=torch.int32)
    keeps_bits = weight.factor is None and min(weight.bits) < 8
    codes = weight.codes if keeps_bits else values.view(torch.uint8)
    # (k, columns), with whole vectors of columns and whole dwords of k.
    bits = torch.tensor(weight.bits)
    columns = -(-rows // VECTOR) * VECTOR
    spread = torch.nn.functional.pad(codes, (0, padded - channels))
    spread = torch.nn.functional.pad(spread.flatten(1), (0, 0, 0, columns - rows)).T
    if keeps_bits:
        data, offsets, uniform = _bit_planes(spread, bits, weight.doubled)
    else:
        data, offsets = _int8_panels(spread)
        uniform = 0
    masks, shifts = _planes_of(bits, weight.doubled, columns)
    if uniform:
        masks[:, PLANES.index(uniform)] = 2**VECTOR - 1
    zeros = _zero_bytes(weight.zero, columns)
    fields = (_aligned(data), offsets, masks, shifts, zeros, weight.scale.float(), sums)
    return Panels(*fields, k4, keeps_bits, uniform)


def _aligned(data: Tensor) -> Tensor:
    """The bytes at an address that is a multiple of 64."""
    room = torch.empty(data.numel() + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + data.numel()].copy_(data.flatten())


def _widths(columns: int) -> list[int]:
    """The number of columns of each panel."""
    return [min(PANEL, columns - first) for first in range(0, columns, PANEL)]


def offsets(sizes: Tensor) -> Tensor:
    """Where each part begins, of parts of these sizes side by side."""
    return sizes.cumsum(0) - sizes


def _int8_panels(values: Tensor) -> tuple[Tensor, Tensor]:
    """The int8 values (k, columns) as panels [k4][columns][4]: their bytes, and each offset."""
    k, columns = values.shape
    dwords = values.reshape(k // 4, 4, columns).permute(0, 2, 1)
    parts = [part.reshape(-1) for part in dwords.split(PANEL, 1)]
    return torch.cat(parts), offsets(torch.tensor([len(part) for part in parts]))


def _bit_planes(codes: Tensor, bits: Tensor, doubled: Tensor) -> tuple[Tensor, Tensor, int]:
    """Bytes and offsets of bit planes of (k, columns), and the bits of the only plane, or 0."""
    k, columns = codes.shape
    codes = torch.nn.functional.pad(codes, (0, 0, 0, -k % RUN))
    # (run, k4 in the run, k in the dword, vector, column)
    runs = codes.reshape(-1, 8, 4, columns // VECTOR, VECTOR)
    present = _present(bits, columns)
    words: list[Tensor] = []
    masks: list[Tensor] = []
    low = torch.zeros(columns, dtype=torch.uint8)
    for plane in (4, 2, 1):
        has = present[plane]
        field = (runs >> low.reshape(-1, VECTOR)) & (2**plane - 1)
        planes = [_plane_word(field, plane, word) for word in range(plane)]
        words += planes
        masks += [has] * plane
        low = low + has.to(torch.uint8) * plane
    whole = [runs[:, k4] for k4 in range(8)]
    words = [*whole, *words]
    masks = [present[8]] * 8 + masks
    # (run, word, k in the dword, vector, column) -> (vector, run, word, column, k in the dword)
    table = torch.stack(words, 1).permute(3, 0, 1, 4, 2)
    kept = torch.stack(masks, 1).reshape(-1, VECTOR, len(words)).transpose(1, 2)
    uniform = _uniform(bits, doubled)
    if uniform:
        kept = kept.clone()
        kept[:] = kept[0, :, :1]
    parts = [
        _panel_bytes(table[first : first + width], kept[first : first + width])
        for first, width in _vectors_of_panels(columns)
    ]
    return torch.cat(parts), offsets(torch.tensor([len(part) for part in parts])), uniform


def _vectors_of_panels(columns: int) -> list[tuple[int, int]]:
    """The first vector of each panel and how many it has."""
    return [
        (panel * PANEL // VECTOR, width // VECTOR) for panel, width in enumerate(_widths(columns))
    ]


def _panel_bytes(table: Tensor, kept: Tensor) -> Tensor:
    """The dwords that exist, run by run, in the order vector, word, column."""
    by_run = table.transpose(0, 1)
    chosen = kept.unsqueeze(0).expand(by_run.shape[:-1])
    return by_run[chosen].flatten()


def _plane_word(field: Tensor, plane: int, word: int) -> Tensor:
    """A dword of a plane: the fields of 8 / plane groups of four k, (run, k, vector, column)."""
    shares = 8 // plane
    parts = [field[:, word * shares + share] << (plane * share) for share in range(shares)]
    return torch.stack(parts).sum(0, dtype=torch.uint8)


def _present(bits: Tensor, columns: int) -> dict[int, Tensor]:
    """For each plane: which columns have it; a column after the last row has none."""
    of_columns = torch.nn.functional.pad(bits, (0, columns - len(bits)))
    return {plane: (of_columns & plane) > 0 for plane in PLANES}


def _planes_of(bits: Tensor, doubled: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The masks and left shifts of the planes, for each vector of 16 columns."""
    present = _present(bits, columns)
    twice = torch.nn.functional.pad(doubled.to(torch.int32), (0, columns - len(bits)))
    powers = 2 ** torch.arange(VECTOR)
    masks = [(present[plane].reshape(-1, VECTOR) * powers).sum(1) for plane in PLANES]
    four = present[4].to(torch.int32) * 4
    two = four + present[2].to(torch.int32) * 2
    shifts = [torch.zeros_like(four), torch.zeros_like(four), four, two + twice]
    by_vector = [shift.reshape(-1, VECTOR) for shift in shifts]
    return torch.stack(masks, 1).to(torch.int32), torch.stack(by_vector, 1).contiguous()
