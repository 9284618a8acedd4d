"""Fisher weights of units' outputs: how much the denoiser's answer depends on each value.

BRECQ (Li et al., 2021) weighs the error of a block's output by the squared gradient of the
network's loss. Of a denoiser with answer eps and the loss || eps - y ||^2 / 2, y drawn around the
float eps with variance one, that gradient is J' (eps - y), and its square is on average the
diagonal of J' J, which is the Fisher information. One float pass forward and backward through the
whole network gives it for all units at once.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowtide.costs import FLOAT, Cost, Workload
from lowtide.costs.workload import ATTENTION_COPIES, BACKWARD_COPIES, SLACK
from lowtide.models import answer_of
from lowtide.models.trace import leaves_of
from lowtide.nn.precision import Precision
from lowtide.nn.swap import set_precision
from lowtide.stages.base import Call, Job
from lowtide.stages.tape import Store, Tape


class Fisher:
    """The weights of one unit's outputs over all kept calls, in the order of its output's tensors.

    Of each output they average one.
    """

    def __init__(self, store: Store, outputs: int):
        self.tapes = [Tape(store) for _ in range(outputs)]
        self.sums = [0.0] * outputs
        self.counts = [0] * outputs

    def append(self, number: int, squares: Tensor) -> None:
        self.tapes[number].append(squares)
        self.sums[number] += float(squares.double().sum())
        self.counts[number] += squares.numel()

    def mean(self, number: int) -> float:
        """The mean square, or 1 where the answer does not depend on the output."""
        return self.sums[number] / self.counts[number] or 1.0


def fisher_weights(job: Job, units: Collection[str], store: Store) -> dict[str, Fisher]:
    """The weights of these units, which are modules of the job's model."""
    set_precision(job.model, Precision.FLOAT)
    calls = [call for call in job.calls if call.kept]
    generator = job.generator("fisher")
    weights: dict[str, Fisher] = {}
    with job.placement.visit(job.model):
        for call in job.track(calls, "gradients of the answer"):
            for name, squares in _squares(job, call, units, generator).items():
                weights.setdefault(name, Fisher(store, len(squares)))
                for number, each in enumerate(squares):
                    weights[name].append(number, each)
    return weights


def _squares(
    job: Job, call: Call, units: Collection[str], generator: torch.Generator
) -> dict[str, list[Tensor]]:
    """The squared gradients at the outputs of each unit for one call."""
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str, result: object) -> None:
        outputs[name] = [leaf for leaf in leaves_of(result) if isinstance(leaf, Tensor)]
        for leaf in outputs[name]:
            if leaf.requires_grad:
                leaf.retain_grad()
            else:
                leaf.requires_grad_()

    hooks = [_hook(job.model.get_submodule(name), name, keep) for name in units]
    arguments = job.on_device(call.arguments)
    sample = job.adapter.parameters[0]
    arguments = arguments | {sample: arguments[sample].clone().requires_grad_()}
    with torch.enable_grad():
        answer = answer_of(job.model(**arguments)).float()
        noise = torch.randn(answer.shape, generator=generator).to(answer)
        (answer * noise).sum().backward()
    for hook in hooks:
        hook.remove()
    return {name: [_square(leaf) for leaf in leaves] for name, leaves in outputs.items()}


def _hook(module: nn.Module, name: str, keep: Callable[[str, object], None]) -> RemovableHandle:
    return module.register_forward_hook(lambda _, args, result: keep(name, result))


def _square(leaf: Tensor) -> Tensor:
    """The squared gradient; zeros where the answer does not depend on the value."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.float().square()


def gradient_cost(load: Workload) -> Cost:
    """A float pass forward and backward through the whole network for each kept call."""
    whole = load.network.whole
    work = whole.forward.of(load.batch)
    seconds = load.kept_calls * (load.speed.forward(work) + load.speed.backward(work))
    values = BACKWARD_COPIES * load.batch * (whole.kept + ATTENTION_COPIES * whole.scores)
    return Cost(seconds, SLACK * FLOAT * values + load.tape_bytes())
