"""Temporal features from a cache: what a temporal layer answers at each calibrated timestep, looked up instead of computed."""

import torch
from torch import Tensor, nn

from lowtide.formats import Grid, mse, pack, packed_bytes, unpack
from lowtide.nn.clock import Clock
from lowtide.nn.plan import CachePlan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer


def gridded(features: Tensor, plan: CachePlan) -> tuple[Tensor, Grid]:
    """Codes of float features, steps x width: for each (step, chunk) the range, shrunk from both ends, of least squared error."""
    rows = features.float().reshape(len(features) * plan.chunks, -1)
    grid = plan.format.params(*mse(rows, plan.format, power=2.0), len(rows))
    return plan.format.encode(rows, grid), grid


class Cached(nn.Module):
    """Takes a temporal layer's place. It never looks at its input, except at steps where the layer itself was chosen."""

    def __init__(self, plan: CachePlan, clock: Clock, layer: nn.Module | None):
        super().__init__()
        self.plan, self.layer, self.quantized = plan, layer, True
        object.__setattr__(self, "clock", clock)
        steps = len(clock.known)
        if plan.format is None:
            self.register_buffer("values", torch.empty(steps, plan.width))
        else:
            rows = steps * plan.chunks
            self.register_buffer(
                "weight",
                torch.empty(rows, packed_bytes(self.columns, plan.format.bits), dtype=torch.uint8),
            )
            self.register_buffer("scale", torch.empty(rows, 1))
            self.register_buffer("zero", torch.empty(rows, 1, dtype=torch.uint8))
        if plan.computed:
            self.register_buffer("chosen", torch.ones(steps, dtype=torch.bool))

    @property
    def columns(self) -> int:
        return self.plan.width // self.plan.chunks

    @torch.no_grad()
    def fill(self, codes: Tensor, grid: Grid) -> None:
        """Take codes, steps x width, and the grid of their chunks."""
        self.weight = pack(codes.reshape(-1, self.columns), self.plan.format.bits)
        self.scale, self.zero = grid.scale.clone(), grid.zero.to(torch.uint8)

    @torch.no_grad()
    def take(self, features: Tensor) -> None:
        """Take float features, steps x width, of as many steps as there are."""
        if self.plan.format is None:
            self.values = features.float().clone()
        else:
            self.fill(*gridded(features, self.plan))

    def cached(self, index: Tensor) -> Tensor:
        """The features of these steps, in float32: (width,) for one step, rows for several."""
        if self.plan.format is None:
            return self.values[index]
        form, chunks = self.plan.format, self.plan.chunks
        rows = (index.reshape(-1, 1) * chunks + torch.arange(chunks, device=index.device)).flatten()
        codes = unpack(self.weight[rows], form.bits, self.columns)
        return form.decode(codes, Grid(self.scale[rows], self.zero[rows].float())).reshape(
            *index.shape, self.plan.width
        )

    def forward(self, x: Tensor) -> Tensor:
        index = self.clock.index.to(self.clock.timesteps.device)
        if not self.quantized:
            return self.layer(x)
        found = self.cached(index).to(x.dtype).expand(len(x), -1)
        if not self.plan.computed:
            return found
        return torch.where(self.chosen[index].reshape(-1, 1), found, self.layer(x))

    def set_precision(self, precision: Precision) -> None:
        """As float: the layer itself, which a job keeps until it packs."""
        self.quantized = precision.weights
        if isinstance(self.layer, QuantizedLayer):
            self.layer.set_precision(precision)


class Blank(nn.Module):
    """Takes the place of a temporal layer that nobody listens to any more: zeros of its width."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)
