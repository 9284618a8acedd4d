"""The feature cache: outputs of a temporal layer, stored for each calibrated timestep."""

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Grid, mse, pack, packed_bytes, unpack
from lowtide.nn.clock import Clock, at_step, step_of_rows
from lowtide.nn.plan import CachePlan
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer


def quantize_features(features: Tensor, plan: CachePlan) -> tuple[Tensor, Grid]:
    """Codes and grid of float features, steps x width, with one row for each (step, chunk).

    The range of a row is the whole range, shrunk from both ends to the least squared error.
    """
    assert plan.format is not None, "this cache keeps float32"
    rows = features.float().reshape(len(features) * plan.chunks, -1)
    grid = plan.format.params(*mse(rows, plan.format, power=2.0), len(rows))
    return plan.format.encode(rows, grid), grid


def one_row_each(answer: Tensor, rows: int) -> Tensor:
    """A layer's answers to so many timesteps; the equal rows of a video's frames count as one."""
    return answer if len(answer) == rows else answer.unflatten(0, (rows, -1))[:, 0]


class Cached(nn.Module):
    """Replaces a temporal layer.

    The output depends on the running step and not on the input, except at steps that still compute
    the layer itself.
    """

    clock: Clock
    values: Tensor  # float32 features, steps x width, where the plan has no format
    weight: Tensor  # packed codes, (steps * chunks) x bytes, where it has one
    scale: Tensor  # (steps * chunks) x 1
    zero: Tensor
    chosen: Tensor  # whether a step reads the cache, (steps,), where some steps compute the layer

    def __init__(self, plan: CachePlan, clock: Clock, layer: nn.Module | None):
        super().__init__()
        self.plan = plan
        self.layer = layer
        self.quantized = True
        # The clock belongs to the denoiser; a plain attribute keeps it out of this module's state.
        object.__setattr__(self, "clock", clock)
        steps = len(clock.known)
        if plan.format is None:
            self.register_buffer("values", torch.empty(steps, plan.width))
        else:
            self._allocate_codes(steps * plan.chunks, plan.format)
        if plan.computed:
            self.register_buffer("chosen", torch.ones(steps, dtype=torch.bool))

    def _allocate_codes(self, rows: int, format: Affine) -> None:
        width = packed_bytes(self.columns, format.bits)
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.uint8))
        self.register_buffer("scale", torch.empty(rows, 1))
        self.register_buffer("zero", torch.empty(rows, 1, dtype=torch.uint8))

    @property
    def columns(self) -> int:
        """The number of values in a chunk."""
        return self.plan.width // self.plan.chunks

    @torch.no_grad()
    def fill(self, codes: Tensor, grid: Grid) -> None:
        """Store codes, steps x width, and the grid of their chunks."""
        assert self.plan.format is not None, "this cache keeps float32"
        self.weight = pack(codes.reshape(-1, self.columns), self.plan.format.bits)
        self.scale = grid.scale.clone()
        self.zero = grid.zero.to(torch.uint8)

    @torch.no_grad()
    def take(self, features: Tensor) -> None:
        """Store float features, steps x width. The number of steps may differ from before."""
        if self.plan.format is None:
            self.values = features.float().clone()
        else:
            self.fill(*quantize_features(features, self.plan))

    @torch.no_grad()
    def add(self, features: Tensor) -> None:
        """Append float features, steps x width, of more steps."""
        if self.plan.format is None:
            self.values = torch.cat([self.values, features.float()])
            return
        codes, grid = quantize_features(features, self.plan)
        packed = pack(codes.reshape(-1, self.columns), self.plan.format.bits)
        self.weight = torch.cat([self.weight, packed])
        self.scale = torch.cat([self.scale, grid.scale])
        self.zero = torch.cat([self.zero, grid.zero.to(torch.uint8)])

    def cached(self, index: Tensor) -> Tensor:
        """The features of these steps in float32: (width,) for one step, rows for several."""
        if self.plan.format is None:
            return at_step(self.values, index)
        chunks = torch.arange(self.plan.chunks, device=index.device)
        rows = (index.reshape(-1, 1) * self.plan.chunks + chunks).flatten()
        codes = unpack(self.weight[rows], self.plan.format.bits, self.columns)
        grid = Grid(self.scale[rows], self.zero[rows].float())
        return self.plan.format.decode(codes, grid).reshape(*index.shape, self.plan.width)

    def forward(self, x: Tensor) -> Tensor:
        if not self.quantized:
            return self._run_layer(x)
        index = self.clock.index.to(self.clock.timesteps.device)
        index = step_of_rows(index, len(x))
        features = self.cached(index).to(x.dtype).expand(len(x), -1)
        if not self.plan.computed:
            return features
        return torch.where(at_step(self.chosen, index).reshape(-1, 1), features, self._run_layer(x))

    def _run_layer(self, x: Tensor) -> Tensor:
        assert self.layer is not None, "the layer is no longer kept beside its cache"
        return self.layer(x)

    def set_precision(self, precision: Precision) -> None:
        """In float, the layer itself runs; a job keeps it until it packs."""
        self.quantized = precision.weights
        if isinstance(self.layer, QuantizedLayer):
            self.layer.set_precision(precision)


class ZeroFeatures(nn.Module):
    """Replaces a temporal layer whose output is no longer used: it gives zeros of its width."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.width)
