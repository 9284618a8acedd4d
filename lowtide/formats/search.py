"""Range searches: (rows, format, weights) -> (lo, hi), one pair per row, for all rows at once.

`weights` say how many values each value stands for; without them, all values count alike.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.formats.affine import Affine
from lowtide.formats.kinds import Format
from lowtide.formats.mixed import Mixed
from lowtide.formats.own_range import OwnRange
from lowtide.formats.stepped import Stepped

# The elements of a piece. A piece stays in cache, and below the size at which torch starts threads,
# whose barriers would take most of the time.
PIECE = 1 << 15
# Elsewhere a piece is as large as its copies can be, because each call of torch has its price.
DEVICE_PIECE = 1 << 22
COARSE = 4

Search = Callable[..., tuple[Tensor, Tensor]]


def minmax(
    rows: Tensor, format: Format | None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole range of each row: two tensors of rows x 1."""
    lo, hi = rows.aminmax(dim=1, keepdim=True)
    return lo, hi


def percentile(
    rows: Tensor, format: Format, weights: Tensor | None = None, keep: float = 0.999
) -> tuple[Tensor, Tensor]:
    """The range that holds a share `keep` of the values; both tails lose the same share."""
    shares = ((1 - keep) / 2, (1 + keep) / 2)
    if weights is None:
        sample = rows.float()[:, :: max(1, rows.shape[1] // 1_000_000)]
        quantiles = torch.tensor(shares, device=rows.device)
        lo, hi = torch.quantile(sample, quantiles, dim=1, keepdim=True)
        return lo, hi
    values, order = rows.float().sort(dim=1)
    below = weights[order].cumsum(1) / weights.sum()
    last = rows.shape[1] - 1
    places = [(below < share).sum(1, keepdim=True).clamp(max=last) for share in shares]
    lo, hi = (values.gather(1, place) for place in places)
    return lo, hi


def mse(
    rows: Tensor,
    format: Format,
    weights: Tensor | None = None,
    power: float = 2.4,
    candidates: int = 80,
) -> tuple[Tensor, Tensor]:
    """The whole range shrunk by 0, 1, ... 79 %, whichever has the least error in the Lp norm.

    Each row has its own best range. Every fourth candidate is tried first, then the neighbours of
    the best one of each row. That is a third of the work, with the same result wherever the error
    has a single minimum. Rows are searched in pieces that stay in cache. The search of a group
    assumes that its scale is free.
    """
    norm = Norm(power, None if weights is None else weights / weights.mean())
    if isinstance(format, Mixed):
        shrink = _best_shrink(rows.float(), format, norm, candidates)
    else:
        plain = replace(format, group=None)
        elements = PIECE if rows.device.type == "cpu" else DEVICE_PIECE
        pieces = rows.split(max(1, elements // rows.shape[1]))
        parts = [_best_shrink(piece.float(), plain, norm, candidates) for piece in pieces]
        shrink = torch.cat(parts)
    lo, hi = minmax(rows, None)
    return lo * shrink, hi * shrink


@dataclass(frozen=True)
class Norm:
    """The error of a range: the weighted mean of |x - x^|^power, where x^ is x on the grid."""

    power: float
    weights: Tensor | None

    def of(self, difference: Tensor) -> Tensor:
        """Rows x columns to rows x 1. In place, because every search spends its time here."""
        errors = difference.abs_().pow_(self.power)
        if self.weights is not None:
            errors = errors.mul_(self.weights)
        return errors.mean(1, keepdim=True)


def _best_shrink(rows: Tensor, format: Format, norm: Norm, candidates: int) -> Tensor:
    """The share of its range with the least error, for each row: rows x 1."""
    best = _Best(rows, format, norm)
    coarse = 1.0 - 0.01 * torch.arange(0, candidates, COARSE, device=rows.device)
    for share in coarse:
        best.compare(share.expand_as(best.share))
    neighbours = [step for step in range(1 - COARSE, COARSE) if step]
    around = 0.01 * torch.tensor(neighbours, device=rows.device)
    fine = (best.share + around[:, None, None].to(best.share)).clamp(max=1.0)
    for share in fine:
        best.compare(share)
    return best.share


class _Best:
    """The best share of the range of each row among the candidates so far, and its error."""

    def __init__(self, rows: Tensor, format: Format, norm: Norm):
        self.rows = rows
        self.format = format
        self.norm = norm
        self.range = minmax(rows, format)
        self.share = rows.new_ones(len(rows), 1)
        self.error = torch.full_like(self.share, float("inf"))

    def compare(self, share: Tensor) -> None:
        """Keep this share of the range, rows x 1, in the rows where its error is less."""
        lo, hi = self.range
        error = range_error(self.rows, self.format, (lo * share, hi * share), self.norm)
        self.share = torch.where(error < self.error, share, self.share)
        self.error = torch.minimum(error, self.error)


def range_error(rows: Tensor, format: Format, ends: tuple[Tensor, Tensor], norm: Norm) -> Tensor:
    """The error of each row under the range `ends` = (lo, hi): rows x 1."""
    lo, hi = ends
    grid = format.params(lo, hi)
    if not isinstance(format, Affine):
        assert not isinstance(format, Stepped | OwnRange), "its range is not searched"
        return norm.of(rows - format.decode(format.encode(rows, grid), grid))
    codes = (rows / grid.scale).add_(grid.zero).round_().clamp_(0, format.top)
    return norm.of(codes.sub_(grid.zero).mul_(grid.scale).sub_(rows))


SEARCHES: dict[str, Search] = {"minmax": minmax, "mse": mse, "percentile": percentile}


def check_search(name: str) -> None:
    if name not in SEARCHES:
        raise BadInput(f"found search {name!r}", " or ".join(SEARCHES), "choose one")
