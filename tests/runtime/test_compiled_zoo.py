"""Every zoo model of the repository, compiled and exported, over a whole trajectory.

The compiler's backend runs torch's own kernels, so that equal means equal: another order of sums
moves values across a rounding, and at the last step of zoo:digits that alone moves the answer by
3 %. For the same reason, the layers' answers are those of calls that compute their own features: a
request computes those of all steps as one batch, which is another order of sums.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from fused_networks import distance
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

import lowtide
from lowtide import zoo
from lowtide.methods import relevant_options
from lowtide.nn.request_cache import RequestCache

QUICK = {"steps": 4, "images": 2, "calibration_steps": 2, "iters": 1, "batch": 2}
FIELDS = {
    "digits": {},
    "digits-cond": {"labels": (0, 1), "guidance": 2.0},
    "cifar10-small": {},
    "dit": {"labels": (0, 1), "guidance": 2.0},
    "emoji": {"prompts": ("heart", "star"), "guidance": 4.0},
}
WIDTHS = {"w8a8": ("minmax", 8), "w4a8": ("best", 4)}
ALIKE = 1e-6
ONE_FLIP = 5e-3  # what a feature that rounds to the next of its 256 codes may do to an answer


@dataclass
class Case:
    """A packed zoo model, its calls while a pipeline draws, and its layers' answers."""

    pipe: object
    model: nn.Module
    calls: list[tuple[tuple, dict]] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)


def answer(output) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def plain_answers(case: Case) -> list[Tensor]:
    with torch.no_grad(), lowtide.unfused(case.model):
        return [answer(case.model(*args, **kwargs)) for args, kwargs in case.calls]


def answers_without_requests(case: Case) -> list[Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestCache, "step_of", lambda cache, values: None)
        return plain_answers(case)


@pytest.fixture(scope="module", params=[f"{name} {width}" for name in FIELDS for width in WIDTHS])
def case(request) -> Case:
    name, width = request.param.split()
    if name not in zoo.names():
        pytest.skip(f"zoo:{name} is not on this machine")
    method, weights = WIDTHS[width]
    options = relevant_options(method, QUICK) | {"weights": weights, "inputs": 8} | FIELDS[name]
    quantized = lowtide.quantize(f"zoo:{name}", method=method, **options)
    made = Case(quantized.pipe, quantized.model)
    hook = made.model.register_forward_pre_hook(
        lambda model, args, kwargs: made.calls.append((args, kwargs)),
        with_kwargs=True,
        prepend=True,
    )
    drawn = lowtide.Request(steps=4, seeds=(5, 6), batch=2, **FIELDS[name])
    lowtide.images(made.pipe, drawn)
    hook.remove()
    made.answers = answers_without_requests(made)
    assert len(made.calls) == 4
    for one, other in zip(plain_answers(made), made.answers, strict=True):
        assert distance(one, other) < ONE_FLIP
    return made


@pytest.fixture(autouse=True)
def compiled_once() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


class Counting:
    """A backend of the compiler that counts the graphs it gets."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return aot_eager(graph, inputs)


def check(case: Case, run) -> None:
    with torch.no_grad():
        found = [answer(run(*args, **kwargs)) for args, kwargs in case.calls]
    for one, other in zip(found, case.answers, strict=True):
        assert distance(one, other) < ALIKE


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_call(case):
    """The hooks of a root, such as its clock, are graphs of their own before and after it."""
    backend = Counting()
    run = torch.compile(case.model, fullgraph=True, backend=backend)
    with torch.no_grad():
        run(*case.calls[0][0], **case.calls[0][1])
    first = backend.graphs
    assert 1 <= first <= 3
    check(case, run)
    assert backend.graphs == first


@pytest.mark.slow
def test_repeated_blocks_are_compiled(case):
    kinds = getattr(case.model, "_repeated_blocks", None)
    if not kinds:
        pytest.skip("diffusers names no repeated blocks of this class")
    backend = Counting()
    blocks = [each for each in case.model.modules() if type(each).__name__ in kinds]
    case.model.compile_repeated_blocks(fullgraph=True, backend=backend)
    try:
        # Blocks share their code, so the compiler takes each size of theirs for a change.
        with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=False):
            case.model(*case.calls[0][0], **case.calls[0][1])
        first = backend.graphs
        assert 1 <= first <= len(blocks)
        check(case, case.model)
        assert backend.graphs == first
    finally:
        for block in blocks:
            block._compiled_call_impl = None


@pytest.mark.slow
def test_an_exported_program_runs_the_whole_trajectory(case):
    args, kwargs = case.calls[0]
    with torch.no_grad():
        check(case, torch.export.export(case.model, args, kwargs, strict=False).module())
