"""Drift: how far each layer is from the reference's on the same denoiser inputs, and temporal features at each step."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.evaluation.compared_models import FLOAT, OURS, Subject
from lowtide.models import Adapter, adapt
from lowtide.models.trace import mapped
from lowtide.nn.plan import Plan
from lowtide.nn.swap import find_clock
from lowtide.stages.temporal_features import temporal_errors

STEPS, IMAGES = 8, 4
Track = Callable[..., Iterator]


@dataclass
class Sums:
    """Squared error and squared reference of every layer, in one call."""

    away: dict[str, float] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        self.away[name] = self.away.get(name, 0.0) + float(
            (ours.double() - theirs.double()).square().sum()
        )
        self.whole[name] = self.whole.get(name, 0.0) + float(theirs.double().square().sum())

    def relative(self, name: str) -> float:
        """Relative L2; a layer that is silent in the reference has no error if it is silent here, and else a whole one."""
        away, whole = self.away[name], self.whole[name]
        return (away / whole) ** 0.5 if whole else float(away > 0)


def reference_calls(
    subject: Subject, request: sampling.Request, calls: int
) -> list[sampling.Moment]:
    """A few of the reference's own denoiser calls, evenly spread over its steps."""
    few = replace(request, seeds=request.seeds[:IMAGES], batch=IMAGES)
    kept = {round(place * (calls - 1) / max(1, STEPS - 1)) for place in range(STEPS)}
    return list(sampling.trajectory(subject.pipe, few, keep=kept))


def reference_adapter(subject: Subject) -> Adapter:
    """The architecture as it is in float, even if this model is not."""
    if subject.kind == FLOAT:
        return adapt(subject.model, sampling.example(subject.pipe))
    return facts.float_adapter(subject.model, Plan())


@torch.no_grad()
def layer_errors(
    adapter: Adapter,
    reference: nn.Module,
    model: nn.Module,
    calls: Sequence[sampling.Moment],
    *,
    skip: Iterable[str] = (),
) -> dict[str, list]:
    """Layers x timesteps: relative L2 of each layer's output, both models called with the reference's inputs.

    Each model runs as a whole, so a layer's error holds what it inherits from those before it.
    """
    modules = [dict(each.named_modules()) for each in (reference, model)]
    names = [
        name
        for name in adapter.layers()
        if name not in set(skip) and all(name in each for each in modules)
    ]
    found = [compared(reference, model, names, call.arguments) for call in calls]
    heard = [name for name in names if all(name in sums.away for sums in found)]
    units = {name: unit.name for unit in adapter.units() for name in unit.layers}
    return {
        "names": heard,
        "units": [units[name] for name in heard],
        "timesteps": [round(float(call.t[0]) * adapter.ticks) for call in calls],
        "error": [[sums.relative(name) for sums in found] for name in heard],
    }


def compared(
    reference: nn.Module, model: nn.Module, names: Sequence[str], arguments: dict[str, Any]
) -> Sums:
    """One call of both; of all outputs only the reference's are held."""
    held: dict[str, deque[Tensor]] = {name: deque() for name in names}
    with listening(reference, names, lambda name, out: held[name].append(out.clone())):
        call(reference, arguments)
    sums = Sums()

    def hear(name: str, out: Tensor) -> None:
        # A block that answers for all steps of a request at once runs with another batch; that is not this call's answer.
        if held[name] and held[name][0].shape == out.shape:
            theirs = held[name].popleft()
            sums.add(name, out.to(theirs.device), theirs)

    with listening(model, names, hear):
        call(model, arguments)
    return sums


def call(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """The model's answer to what was heard."""
    device = next(model.parameters()).device
    return model(
        **mapped(arguments, lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf)
    )


@contextmanager
def listening(
    model: nn.Module, names: Iterable[str], hear: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hear what each of these layers answers."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, out: hear(name, out) if isinstance(out, Tensor) else None

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def temporal_drift(
    adapter: Adapter, reference: Subject, subject: Subject
) -> dict[str, list] | None:
    """TemporalFeatures x timesteps, where the temporal block reads the timestep and nothing else."""
    units = adapter.temporal()
    if (
        not units
        or any(unit.reads != ("timestep",) for unit in units)
        or (reference.kind, subject.kind) != (FLOAT, OURS)
    ):
        return None
    errors = temporal_errors(adapter, reference.model, subject.model, subject.plan.times)
    return {
        "features": [name for unit in units for name in unit.features],
        "timesteps": find_clock(subject.model).timesteps.tolist(),
        "error": errors.T.tolist(),
    }
