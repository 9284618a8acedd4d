"""Several small tables in one int32 tensor: fewer names in the header of a file.

A cast of the module to another float dtype does not change an int32 tensor, so the bits stay.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 4  # bytes


@dataclass(frozen=True)
class PackedTable:
    """The shape and dtype (float32 or uint8) of one table. Each table starts at a whole word."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def words(self) -> int:
        """The number of 4-byte words."""
        return -(-self.count * self.dtype.itemsize // WORD)


def pack_tables(tables: list[Tensor], places: tuple[PackedTable, ...]) -> Tensor:
    """The bits of the tables, one after the other, as int32 words."""
    pairs = zip(tables, places, strict=True)
    return torch.cat([_as_words(table.to(place.dtype)) for table, place in pairs])


def _as_words(table: Tensor) -> Tensor:
    flat = table.contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % WORD)).view(torch.int32)


def unpack_tables(packed: Tensor, places: tuple[PackedTable, ...]) -> list[Tensor]:
    """The inverse of pack_tables; each table is a view of the packed tensor."""
    parts = packed.split([place.words for place in places])
    return [
        part.view(place.dtype)[: place.count].reshape(place.shape)
        for part, place in zip(parts, places, strict=True)
    ]


def flat_tables(packed: Tensor, places: tuple[PackedTable, ...]) -> list[Tensor | None]:
    """The values of each table as one row; None for a table without values.

    Loading looks at all tables of a network, and spares what it can of views.
    """
    tables: list[Tensor | None] = []
    start = 0
    for place in places:
        end = start + place.words
        flat = packed[start:end].view(place.dtype)
        if end == start:
            tables.append(None)
        elif place.dtype == torch.uint8:  # zeros fill the last word
            tables.append(flat[: place.count])
        else:
            tables.append(flat)
        start = end
    return tables


def table_words(places: tuple[PackedTable, ...]) -> int:
    """The number of words of all tables together."""
    return sum(place.words for place in places)
