"""Several small tables as one int32 tensor: fewer names in a file's header, and no cast to another dtype touches them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

WORD = 4


@dataclass(frozen=True)
class Table:
    """The place of one table in a bundle: float32 or uint8, begun at a whole word."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def words(self) -> int:
        return -(-self.count * self.dtype.itemsize // WORD)


def bundled(tables: list[Tensor], places: tuple[Table, ...]) -> Tensor:
    """The tables' own bits, one after the other."""
    return torch.cat(
        [words(table.to(place.dtype)) for table, place in zip(tables, places, strict=True)]
    )


def words(table: Tensor) -> Tensor:
    flat = table.contiguous().flatten().view(torch.uint8)
    return torch.nn.functional.pad(flat, (0, -len(flat) % WORD)).view(torch.int32)


def unbundled(bundle: Tensor, places: tuple[Table, ...]) -> list[Tensor]:
    """Each table again, as a view."""
    parts = bundle.split([place.words for place in places])
    return [
        part.view(place.dtype)[: place.count].reshape(place.shape)
        for part, place in zip(parts, places, strict=True)
    ]


def bundle_words(places: tuple[Table, ...]) -> int:
    return sum(place.words for place in places)
