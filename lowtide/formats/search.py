"""Range searches: (rows, format, weights) -> (lo, hi), one pair per row, all rows at once. Without weights values are alike."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowtide.errors import BadInput
from lowtide.formats.affine import Affine
from lowtide.formats.mixed import Mixed
from lowtide.formats.plain import Format

PIECE = (
    1 << 15
)  # elements: a piece stays in cache, and below torch's threshold for threads, whose barriers would dominate
COARSE = 4

Search = Callable[..., tuple[Tensor, Tensor]]


def minmax(
    rows: Tensor, format: Format | None, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The whole range."""
    lo, hi = rows.aminmax(dim=1, keepdim=True)
    return lo, hi


def percentile(
    rows: Tensor, format: Format, weights: Tensor | None = None, keep: float = 0.999
) -> tuple[Tensor, Tensor]:
    """The range that holds a share `keep` of the values, the tails cut evenly."""
    if weights is None:
        ends = torch.tensor([(1 - keep) / 2, (1 + keep) / 2], device=rows.device)
        lo, hi = torch.quantile(
            rows.float()[:, :: max(1, rows.shape[1] // 1_000_000)], ends, dim=1, keepdim=True
        )
        return lo, hi
    values, order = rows.float().sort(dim=1)
    below = weights[order].cumsum(1) / weights.sum()
    last = rows.shape[1] - 1
    lo, hi = (
        values.gather(1, (below < end).sum(1, keepdim=True).clamp(max=last))
        for end in ((1 - keep) / 2, (1 + keep) / 2)
    )
    return lo, hi


def mse(
    rows: Tensor,
    format: Format,
    weights: Tensor | None = None,
    power: float = 2.4,
    candidates: int = 80,
) -> tuple[Tensor, Tensor]:
    """The whole range shrunk by 0, 1, ... 79 %, whichever loses least in the Lp norm. Rows compete on their own.

    Every fourth candidate is tried, then the neighbours of each row's best: a third of the work, the same answer wherever
    the loss has one valley. Rows go in pieces that stay in cache. A group is searched as if its scale were free.
    """
    norm = Norm(power, None if weights is None else weights / weights.mean())
    plain = replace(format, group=None, axis=0) if isinstance(format, Affine) else format
    if isinstance(format, Mixed):
        return shrunk(rows, best_shrink(rows.float(), plain, norm, candidates))
    pieces = rows.split(max(1, PIECE // rows.shape[1]))
    shrink = torch.cat([best_shrink(piece.float(), plain, norm, candidates) for piece in pieces])
    return shrunk(rows, shrink)


@dataclass(frozen=True)
class Norm:
    """What a range loses: the mean of |x - x^|^power, weighed by how many values each of these stands for."""

    power: float
    weights: Tensor | None

    def of(self, lost: Tensor) -> Tensor:
        """In place, because this is the inner loop of every search."""
        lost = lost.abs_().pow_(self.power)
        return (lost if self.weights is None else lost.mul_(self.weights)).mean(1, keepdim=True)


def shrunk(rows: Tensor, shrink: Tensor) -> tuple[Tensor, Tensor]:
    lo, hi = minmax(rows, None)
    return lo * shrink, hi * shrink


def best_shrink(rows: Tensor, format: Format, norm: Norm, candidates: int) -> Tensor:
    """Coarse, then fine: per row, the share of its range that loses least."""
    best = rows.new_ones(len(rows), 1)
    least = torch.full_like(best, float("inf"))
    coarse = 1.0 - 0.01 * torch.arange(0, candidates, COARSE, device=rows.device)
    best, least = improved(
        rows, format, norm, (coarse[:, None, None] * torch.ones_like(best), best, least)
    )
    around = 0.01 * torch.tensor(
        [step for step in range(1 - COARSE, COARSE) if step], device=rows.device
    )
    fine = (best + around[:, None, None].to(best)).clamp(0.01, 1.0)
    return improved(rows, format, norm, (fine, best, least))[0]


def improved(
    rows: Tensor, format: Format, norm: Norm, state: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The best of the candidates and what was best so far."""
    candidates, best, least = state
    lo, hi = minmax(rows, format)
    for shrink in candidates:
        loss = loss_of(rows, format, (lo * shrink, hi * shrink), norm)
        best, least = torch.where(loss < least, shrink, best), torch.minimum(loss, least)
    return best, least


def loss_of(rows: Tensor, format: Format, ends: tuple[Tensor, Tensor], norm: Norm) -> Tensor:
    """What each row loses."""
    grid = format.params(*ends)
    if isinstance(format, Affine):
        lost = (
            (rows / grid.scale)
            .add_(grid.zero)
            .round_()
            .clamp_(0, format.top)
            .sub_(grid.zero)
            .mul_(grid.scale)
            .sub_(rows)
        )
    else:
        lost = rows - format.decode(format.encode(rows, grid), grid)
    return norm.of(lost)


SEARCHES: dict[str, Search] = {"minmax": minmax, "mse": mse, "percentile": percentile}


def check_search(name: str) -> None:
    if name not in SEARCHES:
        raise BadInput(f"found search {name!r}", " or ".join(SEARCHES), "choose one")
