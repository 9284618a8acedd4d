"""Layer drift: the error of each layer on the reference's inputs, and of temporal features."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowtide import runtime, sampling
from lowtide.checkpoint import facts
from lowtide.evaluation.compared_models import FLOAT, LOWTIDE, ComparedModel
from lowtide.models import Adapter, Answer
from lowtide.models.trace import mapped
from lowtide.nn.plan import Plan
from lowtide.nn.swap import find_clock
from lowtide.report.evidence import LayerErrors, TemporalErrors
from lowtide.stages.temporal_features import temporal_errors

# At most so many denoiser calls, each with at most so many images.
STEPS = 8
IMAGES = 4


@dataclass
class LayerSquares:
    """The squared error and the squared reference of each layer, in one denoiser call."""

    error: dict[str, float] = field(default_factory=dict)
    reference: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, output: Tensor, reference: Tensor) -> None:
        error = (output.double() - reference.double()).square().sum()
        square = reference.double().square().sum()
        self.error[name] = self.error.get(name, 0.0) + float(error)
        self.reference[name] = self.reference.get(name, 0.0) + float(square)

    def relative(self, name: str) -> float:
        """Relative L2. For a reference of zeros: 0 if the output is zero too, else 1."""
        error = self.error[name]
        reference = self.reference[name]
        return (error / reference) ** 0.5 if reference else float(error > 0)


def reference_calls(
    model: ComparedModel, request: sampling.Request, calls: int
) -> list[sampling.Moment]:
    """A few of the reference's denoiser calls, spread evenly over its `calls` calls."""
    few = replace(request, seeds=request.seeds[:IMAGES], batch=IMAGES)
    indices = {round(place * (calls - 1) / max(1, STEPS - 1)) for place in range(STEPS)}
    return list(sampling.trajectory(model.pipe, few, keep=indices))


def reference_adapter(model: ComparedModel, request: sampling.Request) -> Adapter:
    """The architecture of the float model, even if this model is quantized."""
    if model.kind == FLOAT:
        return sampling.pipeline_adapter(model.pipe, request)
    return facts.float_adapter(model.denoiser, Plan(example=model.plan.example))


@torch.no_grad()
def layer_errors(
    adapter: Adapter,
    reference: nn.Module,
    model: nn.Module,
    calls: Sequence[sampling.Moment],
    *,
    skip: Iterable[str] = (),
) -> LayerErrors:
    """The error of each layer's output, when both models are called with the reference's inputs.

    Each model runs as a whole, so a layer's error includes what it inherits from earlier layers.
    """
    names = _shared_layers(adapter, [reference, model], set(skip))
    squares = [_compared_call(reference, model, names, call.arguments) for call in calls]
    measured = [name for name in names if all(name in each.error for each in squares)]
    return LayerErrors(
        names=measured,
        units=[unit_names(adapter)[name] for name in measured],
        timesteps=[round(float(call.t[0]) * adapter.ticks) for call in calls],
        error=[_row(squares, name) for name in measured],
    )


def _shared_layers(adapter: Adapter, models: Sequence[nn.Module], skip: set[str]) -> list[str]:
    """Layers that all models have, in forward order."""
    modules = [dict(model.named_modules()) for model in models]
    names = [name for name in adapter.layers() if name not in skip]
    return [name for name in names if all(name in each for each in modules)]


def unit_names(adapter: Adapter) -> dict[str, str]:
    """The unit of each layer."""
    names: dict[str, str] = {}
    for unit in adapter.units():
        names |= dict.fromkeys(unit.layers, unit.name)
    return names


def _row(squares: Sequence[LayerSquares], name: str) -> list[float]:
    return [each.relative(name) for each in squares]


def _compared_call(
    reference: nn.Module, model: nn.Module, names: Sequence[str], arguments: Mapping[str, object]
) -> LayerSquares:
    """One call of both models; only the reference's outputs are kept in memory."""
    outputs: dict[str, deque[Tensor]] = {name: deque() for name in names}
    with _observed_outputs(reference, names, lambda name, x: outputs[name].append(x.clone())):
        call(reference, arguments)
    squares = LayerSquares()

    def compare_output(name: str, x: Tensor) -> None:
        # A block that computes all steps of a request at once has another batch size; such an
        # output does not belong to this call.
        if outputs[name] and outputs[name][0].shape == x.shape:
            expected = outputs[name].popleft()
            squares.add(name, x.to(expected.device), expected)

    with _observed_outputs(model, names, compare_output):
        call(model, arguments)
    return squares


def call(model: nn.Module, arguments: Mapping[str, object]) -> Answer:
    """The model's output for recorded arguments."""
    return model(**as_read_by(model, arguments))


def as_read_by(model: nn.Module, tree: object) -> Any:
    """Recorded values on the model's device, samples and embeddings in the type of its weights.

    A timestep keeps its type: in bfloat16, 961 would be 960.
    """
    like = next(weight for weight in model.parameters() if weight.is_floating_point())

    def moved(leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        is_sample = leaf.is_floating_point() and leaf.dim() > 1
        return leaf.to(like) if is_sample else leaf.to(like.device)

    return mapped(tree, moved)


@contextmanager
def _observed_outputs(
    model: nn.Module, names: Iterable[str], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `observe` with the name and the output tensor of each of these layers."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, x: observe(name, x) if isinstance(x, Tensor) else None

    hooks = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        with runtime.plain(model):
            yield
    finally:
        for handle in hooks:
            handle.remove()


def temporal_drift(
    adapter: Adapter, reference: ComparedModel, model: ComparedModel
) -> TemporalErrors | None:
    """The error of temporal features, if the temporal block reads the timestep and nothing else."""
    units = adapter.temporal()
    reads_time_alone = units and all(unit.reads == ("timestep",) for unit in units)
    if not reads_time_alone or (reference.kind, model.kind) != (FLOAT, LOWTIDE):
        return None
    timesteps = list(find_clock(model.denoiser).known)
    if not timesteps:
        return None  # a model without calibration has no timesteps of its own
    errors = temporal_errors(adapter, reference.denoiser, model.denoiser, model.plan.times)
    features: list[str] = []
    for unit in units:
        features += unit.features
    return TemporalErrors(features, timesteps, errors.T.tolist())
