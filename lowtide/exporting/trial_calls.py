"""Example calls of a packed denoiser: random inputs at its calibrated timesteps."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from lowtide.checkpoint.facts import float_adapter
from lowtide.models import Arguments, answer_of
from lowtide.models.trace import flat_inputs
from lowtide.nn.plan import Plan

TIMESTEP = "timestep"
SEED = 0
BATCH = 2
CALLS = 4  # timesteps of the comparison


def example_calls(model: nn.Module, plan: Plan) -> list[Arguments]:
    """A few calls from the first calibrated timestep to the last, each with one timestep."""
    adapter = float_adapter(model, plan)
    _give_a_place(adapter.meta)
    steps = np.linspace(0, len(plan.times) - 1, min(CALLS, len(plan.times))).round().astype(int)
    calls: list[Arguments] = []
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        for step in steps.tolist():
            arguments = adapter.architecture.example(adapter.meta, BATCH)
            arguments.pop("return_dict", None)
            arguments[TIMESTEP] = torch.tensor([plan.times[step]], dtype=torch.float32)
            calls.append(arguments)
    return calls


def _give_a_place(meta: nn.Module) -> None:
    """Put the first parameter of a model without data on the CPU.

    Examples are made in the type and on the device of that parameter.
    """
    name, parameter = next(iter(meta.named_parameters()))
    owner, _, leaf = name.rpartition(".")
    real = nn.Parameter(torch.zeros(parameter.shape), requires_grad=False)
    meta.get_submodule(owner)._parameters[leaf] = real


@torch.no_grad()
def answers_of(model: nn.Module, calls: Sequence[Arguments]) -> list[Tensor]:
    """The denoiser's own answers to these calls, whose one timestep is that of every sample."""
    return [answer_of(model(**with_times(call), return_dict=False)) for call in calls]


def with_times(call: Arguments) -> Arguments:
    """The call with its one timestep repeated for each sample, as pipelines pass it.

    Some denoisers reshape what they compute of it to the batch. The first input is the sample.
    """
    sample = next(iter(call.values()))
    return call | {TIMESTEP: call[TIMESTEP].expand(sample.shape[0])}


def arrays(call: Arguments) -> dict[str, np.ndarray]:
    """The tensors of a call as arrays, by dotted name."""
    return {name: value.numpy() for name, value in flat_inputs(call).items()}


def relative_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The relative L2 of all answers together."""
    difference = sum(
        float((a - b).double().square().sum()) for a, b in zip(found, expected, strict=True)
    )
    size = sum(float(each.double().square().sum()) for each in expected)
    return (difference / size) ** 0.5
