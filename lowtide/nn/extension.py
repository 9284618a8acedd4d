"""Extension: a packed denoiser runs a schedule that it was not calibrated for.

When a call comes at an unknown timestep, every table that is keyed by timestep gets a row for it,
and for all other timesteps of the same schedule. This happens once a schedule: later calls, fused
programs and compiled graphs read the tables as before.

    input ranges     interpolated between the two nearest calibrated timesteps
    corrections      likewise
    features         of the block that the checkpoint keeps, at exactly this timestep
    request caches   build the features of the new timesteps with those of the next request

Saving writes the tables that were loaded, and leaves the added rows out.
"""

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowtide.formats import Affine, Stepped
from lowtide.nn.clock import CLOCK, Clock, find_clock
from lowtide.nn.correction import Correction
from lowtide.nn.feature_cache import Cached, one_row_each
from lowtide.nn.plan import Plan
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.request_cache import request_caches
from lowtide.nn.request_features import PerRequest
from lowtide.nn.split import shape_adapter

if TYPE_CHECKING:
    from lowtide.models import Adapter

MOST = 2000  # added steps; with more, those of earlier schedules are removed


class Neighbours(NamedTuple):
    """Two calibrated steps around each new timestep, and the share of the upper one: (new,)."""

    lower: Tensor
    upper: Tensor
    share: Tensor

    @classmethod
    def of(cls, calibrated: list[float], new: list[float]) -> "Neighbours":
        """Outside the calibrated timesteps, both are the outermost one."""
        known = torch.tensor(calibrated, dtype=torch.float64)
        asked = torch.tensor(new, dtype=torch.float64)
        order = known.argsort()
        place = torch.searchsorted(known[order], asked)
        lower = order[(place - 1).clamp(min=0)]
        upper = order[place.clamp(max=len(known) - 1)]
        width = known[upper] - known[lower]
        share = torch.where(width > 0, (asked - known[lower]) / width, 0.0)
        return cls(lower, upper, share)

    def on(self, device: torch.device) -> "Neighbours":
        return Neighbours(*(part.to(device) for part in self))

    @property
    def nearest(self) -> Tensor:
        """The nearer of the two steps."""
        return torch.where(self.share < 0.5, self.lower, self.upper)

    def between(self, table: Tensor) -> Tensor:
        """The values of a table (..., steps) at the new timesteps: (..., new)."""
        share = self.share.to(table.dtype)
        return torch.lerp(table[..., self.lower], table[..., self.upper], share)


class Extension:
    """Adds steps to a denoiser whose caches, if there are any, have their layers beside them.

    adapter: of the float model, where it has no configuration that the adapter could be made from.
    """

    def __init__(self, plan: Plan, adapter: "Adapter | None" = None):
        self.splits = plan.splits
        self.example = plan.example
        self.adapter = adapter
        self.has_told = False

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def add(self, root: nn.Module, values: list[float], *, whole: bool) -> None:
        """Add a step for each of these timesteps that has none; `whole`: they are a schedule."""
        clock = find_clock(root)
        self._tell(root)
        if len(clock.added) + len(values) > MOST:
            forget_added_steps(root)
        new = [value for value in values if clock.lookup(value) is None]
        neighbours = Neighbours.of(clock.times, new)
        features = self._features(root, new)
        if clock.per_step:
            scale, zero = interpolated_ranges(root, neighbours)
            clock.scale = torch.cat([clock.scale, scale], 1)
            clock.zero = torch.cat([clock.zero, zero], 1)
        for module in root.modules():
            if isinstance(module, Correction):
                module.add(*interpolated_correction(module, neighbours))
            elif isinstance(module, PerRequest):
                module.add(neighbours.nearest)
        for name, feature in features.items():
            _cache(root, name).add(feature)
        clock.add(new)
        if whole:
            for cache in request_caches(root):
                cache.add(values)

    def _features(self, root: nn.Module, times: list[float]) -> dict[str, Tensor]:
        """Every cached feature at these timesteps, from the layers beside the caches."""
        names = [name for name, module in root.named_modules() if isinstance(module, Cached)]
        if not names:
            return {}
        if self.adapter is None:
            self.adapter = shape_adapter(root, self.splits, self.example)
        return kept_features(root, self.adapter, names, torch.tensor(times, dtype=torch.float32))

    def _tell(self, root: nn.Module) -> None:
        if self.has_told:
            return
        self.has_told = True
        clock = find_clock(root)
        warnings.warn(
            f"{type(root).__name__} was calibrated for {len(clock.known)} timesteps of another "
            "schedule. At new ones its input ranges are interpolated, and images may be farther "
            "from the float model's (docs/guides/schedules.md).",
            stacklevel=2,
        )


def kept_features(
    root: nn.Module, adapter: "Adapter", names: list[str], times: Tensor
) -> dict[str, Tensor]:
    """The features of these caches at `times`, (T,), as the layers beside them compute: T x width.

    They are not rounded yet.
    """
    features: dict[str, Tensor] = {}
    timestep = times.to(next(root.parameters()).device)
    for unit in adapter.temporal():
        if not set(names) & set(unit.features):
            continue
        caches = [_cache(root, name) for name in unit.features]
        for cache in caches:
            cache.set_precision(Precision.FLOAT)
        graph = adapter.temporal_graph(unit, len(times))
        answers = graph.replay(root, {"timestep": timestep})
        rows = [one_row_each(answer, len(times)) for answer in answers]
        features |= zip(unit.features, rows, strict=True)
        for cache in caches:
            cache.set_precision(Precision.FULL)
    return features


def _cache(root: nn.Module, name: str) -> Cached:
    cache = root.get_submodule(name)
    assert isinstance(cache, Cached)
    return cache


def interpolated_ranges(root: nn.Module, neighbours: Neighbours) -> tuple[Tensor, Tensor]:
    """Scales and zero points, quantizers x new: both ends of each range lie on a line over t.

    The zero point is rounded. Where it says which of two formats a step has, and the neighbours
    differ, the nearer one counts.
    """
    clock = find_clock(root)
    near = neighbours.on(clock.scale.device)
    scale = near.between(clock.scale)
    zero = (near.between(clock.zero * clock.scale) / scale).round().to(torch.uint8)
    quantizers = (module for module in root.modules() if isinstance(module, Quantizer))
    for quantizer in quantizers:
        if quantizer.format is None or isinstance(quantizer.format, Affine):
            continue
        row = quantizer.row
        differ = clock.zero[row, near.lower] != clock.zero[row, near.upper]
        scale[row] = torch.where(differ, clock.scale[row, near.nearest], scale[row])
        zero[row] = torch.where(differ, clock.zero[row, near.nearest], zero[row])
    return scale, zero


def interpolated_correction(
    correction: Correction, neighbours: Neighbours
) -> tuple[Tensor, Tensor, Tensor]:
    """Slope, bias and noise at the new timesteps, each (new, ...)."""
    near = neighbours.on(correction.slope.device)
    bias = near.between(correction.bias.T).T.contiguous()
    return near.between(correction.slope), bias, near.between(correction.noise)


class KeyedTable(NamedTuple):
    """A buffer that is keyed by step: its name in a state, its axis, the rows of each step."""

    name: str
    owner: nn.Module
    axis: int = 0
    rows: int = 1

    def first(self, tensor: Tensor, steps: int) -> Tensor:
        return tensor.narrow(self.axis, 0, steps * self.rows).contiguous()

    def cut(self, steps: int) -> None:
        """Keep the first steps."""
        attribute = self.name.rpartition(".")[2]
        setattr(self.owner, attribute, self.first(self.owner.get_buffer(attribute), steps))


def step_tables(root: nn.Module) -> Iterator[KeyedTable]:
    """Every buffer that is keyed by step."""
    for name, module in root.named_modules():
        keys = list(module._buffers)
        if isinstance(module, Clock):
            yield KeyedTable(f"{name}.timesteps", module)
            ranges = ("scale", "zero") if module.per_step else ()
            yield from (KeyedTable(f"{name}.{key}", module, axis=1) for key in ranges)
        elif isinstance(module, Correction | PerRequest):
            yield from (KeyedTable(f"{name}.{key}", module) for key in keys)
        elif isinstance(module, Cached):
            chunks = 1 if module.plan.format is None else module.plan.chunks
            rows = {"values": 1, "chosen": 1}
            for key in keys:
                yield KeyedTable(f"{name}.{key}", module, rows=rows.get(key, chunks))


def forget_added_steps(root: nn.Module) -> None:
    """Give every table the steps that it was calibrated for."""
    clock = find_clock(root)
    if not clock.added:
        return
    for table in step_tables(root):
        table.cut(len(clock.known))
    clock.forget_added()
    for cache in request_caches(root):
        cache.set_plan(cache.plan)


def _write_calibrated(
    root: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    """A state has the tables without the steps that were added."""
    if CLOCK not in root._modules:
        return  # the model has been dequantized
    clock = find_clock(root)
    if not clock.added:
        return
    for table in step_tables(root):
        name = prefix + table.name
        state[name] = table.first(state[name], len(clock.known))


def accept_new_timesteps(root: nn.Module, plan: Plan, adapter: "Adapter | None" = None) -> None:
    """Let a packed denoiser add steps, if its plan kept what that needs."""
    if not plan.keyed or not extends(plan):
        return
    clock = find_clock(root)
    clock.extension = Extension(plan, adapter)
    clock.exact = bool(plan.cached)
    root.register_state_dict_post_hook(_write_calibrated)


def extends(plan: Plan) -> bool:
    """Whether a model of this plan can run timesteps that it was not calibrated for."""
    has_equal_bits = not any(isinstance(each.input, Stepped) for each in plan.all_plans())
    return has_equal_bits and all(cache.kept for cache in plan.cached.values())
