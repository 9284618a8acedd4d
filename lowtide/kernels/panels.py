"""The weight of a layer in the order of the native kernels: panels of 64 output channels.

A weight of 8 bits is int8. A weight of fewer bits keeps its bits: planes of 4, 2 and 1 bits, which
the kernels unpack right before they use a panel, and multiply by the factors of its groups.
kernels/native/gemm.inc says the order of bytes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowtide.formats import packed_bytes
from lowtide.kernels import native_library
from lowtide.kernels.integers import IntegerWeight, Rows, rows_of_grid
from lowtide.kernels.ops import Spec

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
    `uniform`: the bits of the one plane that all columns have, or 0. Bit planes of a weight in
    groups have `factors` (vectors, groups, 16), and `groups`, the group of each k.
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
    factors: Tensor | None = None
    groups: Tensor | None = None

    @property
    def structure(self) -> native_library.Weight:
        """The weight as the kernels take it; it points to these tensors."""
        fields = (self.data, self.panel, self.masks, self.shifts, self.zeros, self.scale, self.sums)
        fields += (self.factors, self.groups)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in fields]
        count = 0 if self.factors is None else self.factors.shape[1]
        sizes = (self.columns, self.k4, count, int(self.planes), self.uniform)
        return native_library.Weight(*addresses, *sizes)

    @property
    def nbytes(self) -> int:
        """Of the values, and of what their groups multiply them by."""
        return self.data.nbytes + (0 if self.factors is None else self.factors.nbytes)

    @property
    def columns(self) -> int:
        return len(self.scale)


def arranged(packed: Tensor, rows: Rows, channels: int, taps: int) -> Panels:
    """The weight in panels, from the bytes of a checkpoint, by the native library."""
    empty = _empty_panels(rows, channels, taps)
    _arrange(packed, rows, empty, channels, taps, backwards=False)
    return empty


def restored(data: Tensor, rows: Rows, channels: int, taps: int) -> Tensor:
    """The bytes of the checkpoint, flat, from those of the panels: the inverse of `arranged`."""
    packed = torch.zeros(int(_row_bytes(rows, channels * taps).sum()), dtype=torch.uint8)
    panels = replace(_empty_panels(rows, channels, taps), data=data)
    _arrange(packed, rows, panels, channels, taps, backwards=True)
    return packed


def _row_bytes(rows: Rows, columns: int) -> Tensor:
    """The bytes of each packed row."""
    return -(-rows.bits * columns // 8)


def _arrange(
    packed: Tensor, rows: Rows, panels: Panels, channels: int, taps: int, *, backwards: bool
) -> None:
    row_start = _offsets(_row_bytes(rows, channels * taps))
    doubled = rows.doubled.to(torch.int32)
    factor = None if rows.factor is None else rows.factor.contiguous()
    flat = packed.contiguous()
    arguments = native_library.Arrange(
        packed=flat.data_ptr(),
        row_start=row_start.data_ptr(),
        bits=rows.bits.data_ptr(),
        zero=rows.zero.data_ptr(),
        doubled=doubled.data_ptr(),
        factor=None if factor is None else factor.data_ptr(),
        group=rows.group,
        rows=len(rows.bits),
        channels=channels,
        taps=taps,
        data=panels.data.data_ptr(),
        panel=panels.panel.data_ptr(),
        masks=panels.masks.data_ptr(),
        sums=panels.sums.data_ptr(),
        planes=int(panels.planes),
        backwards=int(backwards),
    )
    native_library.native().run_one(arguments, torch.get_num_threads())


def _empty_panels(rows: Rows, channels: int, taps: int) -> Panels:
    """Panels whose bytes and sums are not filled yet."""
    count = len(rows.bits)
    columns = -(-count // VECTOR) * VECTOR
    k4 = taps * -(-channels // 4)
    uniform = _uniform(rows.bits, rows.doubled) if rows.keeps_bits else 0
    masks, shifts = _planes_of(rows.bits, rows.doubled, columns)
    if uniform:
        masks[:, PLANES.index(uniform)] = 2**VECTOR - 1
    sizes = _panel_sizes(masks, k4) if rows.keeps_bits else 4 * k4 * torch.tensor(_widths(columns))
    factors, groups = _group_tables(rows, channels, taps) if rows.keeps_bits else (None, None)
    return Panels(
        data=torch.empty(int(sizes.sum()), dtype=torch.uint8),
        panel=_offsets(sizes),
        masks=masks,
        shifts=shifts,
        zeros=_zero_bytes(rows.zero, columns),
        scale=rows.scale,
        sums=torch.zeros(count, dtype=torch.int32),
        k4=k4,
        planes=rows.keeps_bits,
        uniform=uniform,
        factors=factors,
        groups=groups,
    )


def _group_tables(rows: Rows, channels: int, taps: int) -> tuple[Tensor | None, Tensor | None]:
    """The factors of each vector of columns, and the group of each k; None without groups."""
    if rows.factor is None:
        return None, None
    count = len(rows.bits)
    padded = torch.nn.functional.pad(rows.factor, (0, 0, 0, -count % VECTOR), value=1)
    factors = padded.reshape(-1, VECTOR, padded.shape[1]).transpose(1, 2).contiguous()
    # A channel that fills up a dword has the group of the last one: within a dword, groups that
    # begin and end alike are one.
    of_channels = rows.groups(channels, taps)
    filling = of_channels[:, -1:].expand(-1, -channels % 4)
    groups = torch.cat([of_channels, filling], 1).flatten()
    groups = torch.nn.functional.pad(groups, (0, -len(groups) % RUN))
    return factors, groups.to(torch.int32)


def _panel_sizes(masks: Tensor, k4: int) -> Tensor:
    """Bytes of each panel of bit planes."""
    runs = -(-k4 * 4 // RUN)
    columns = (masks.unsqueeze(-1) >> torch.arange(VECTOR) & 1).sum(-1)
    by_vector = (columns * torch.tensor(PLANES)).sum(1) * 4 * runs
    vectors = PANEL // VECTOR
    missing = -len(by_vector) % vectors
    return torch.nn.functional.pad(by_vector, (0, missing)).reshape(-1, vectors).sum(1)


def _uniform(bits: Tensor, doubled: Tensor) -> int:
    """The bits of the only plane of all columns, or 0. The kernels double codes of one bit."""
    fewest, most = map(int, bits.aminmax())
    same = fewest == most and most in (4, 2, 1)
    return most if same and (most != 1 or bool(doubled.all())) else 0


def _zero_bytes(zero: Tensor, columns: int) -> Tensor:
    """Each column's zero point in each byte of a dword."""
    zeros = torch.zeros(columns, dtype=torch.int64)
    zeros[: len(zero)] = zero.to(torch.int64) * _BYTES
    return torch.where(zeros >= 2**31, zeros - 2**32, zeros).to(torch.int32)


def panels(weight: IntegerWeight) -> Panels:
    """The weight in panels, by torch; the twin of `arranged`."""
    rows, taps, channels = weight.codes.shape
    empty = _empty_panels(weight.rows, channels, taps)
    values = weight.values()
    codes = weight.codes if empty.planes else values.view(torch.uint8)
    # (k, columns), with whole vectors of columns and whole dwords of k.
    spread = torch.nn.functional.pad(codes, (0, -channels % 4)).flatten(1)
    spread = torch.nn.functional.pad(spread, (0, 0, 0, -rows % VECTOR)).T
    if empty.planes:
        data = _bit_planes(spread, weight.rows.bits, empty.uniform)
    else:
        data = _int8_panels(spread)
    assert len(data) == len(empty.data)
    sums = values.sum((1, 2), dtype=torch.int32)
    return replace(empty, data=_aligned(data), sums=sums)


def _aligned(data: Tensor) -> Tensor:
    """The bytes at an address that is a multiple of 64."""
    room = torch.empty(data.numel() + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    return room[start : start + data.numel()].copy_(data.flatten())


def _widths(columns: int) -> list[int]:
    """The number of columns of each panel."""
    return [min(PANEL, columns - first) for first in range(0, columns, PANEL)]


def _offsets(sizes: Tensor) -> Tensor:
    """Where each part begins, of parts of these sizes side by side."""
    return sizes.cumsum(0) - sizes


def _int8_panels(values: Tensor) -> Tensor:
    """The bytes of int8 values (k, columns) as panels [k4][columns][4]."""
    k, columns = values.shape
    dwords = values.reshape(k // 4, 4, columns).permute(0, 2, 1)
    return torch.cat([part.reshape(-1) for part in dwords.split(PANEL, 1)])


def _bit_planes(codes: Tensor, bits: Tensor, uniform: int) -> Tensor:
    """The bytes of bit planes of (k, columns). `uniform`: the bits of the only plane, or 0."""
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
    if uniform:
        kept = kept.clone()
        kept[:] = kept[0, :, :1]
    parts = [
        _panel_bytes(table[first : first + width], kept[first : first + width])
        for first, width in _vectors_of_panels(columns)
    ]
    return torch.cat(parts)


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


@torch.library.custom_op("lowtide::restore", mutates_args=())
def restore(data: Tensor, grid: list[Tensor], spec: list[int], channels: int, taps: int) -> Tensor:
    """The packed codes of a layer in the order of the checkpoint, from the bytes of its panels.

    `grid` and `spec` are those of lowtide::linear.
    """
    return restored(data, rows_of_grid(grid, Spec.of(spec)), channels, taps)


@restore.register_fake
def _(data: Tensor, grid: list[Tensor], spec: list[int], channels: int, taps: int) -> Tensor:
    rows = grid[0].shape[0]
    bits = spec[4:] * rows if len(spec) == 5 else spec[4:]
    return data.new_empty(sum(packed_bytes(channels * taps, each) for each in bits))
