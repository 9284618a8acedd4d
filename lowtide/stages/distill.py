"""Distill: train the whole quantized network to answer like the float one.

This and Reconstruct are the only two training loops of the library. It learns low-rank changes of
the weights (QALoRA), the scales of weights, and the scales of inputs, one for each step (TALSQ).
The clock's table is keyed by timestep, so a scale cannot belong to a wrong step. Both models read
the recorded calls, which lie on the float model's own trajectory. An iteration takes one forward
and backward pass of the student; the float answers are computed once per call. Terms that earlier
stages added (job.terms) read pairs of consecutive steps and take one float pass more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import ATTENTION_COPIES, BACKWARD_COPIES, ROUND, SLACK, rounding_inputs
from lowtide.formats import Affine
from lowtide.models import answer_of
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock, quant_layers, quantizers, set_precision
from lowtide.stages.base import Job, Stage
from lowtide.stages.batches import CalibrationBatches, Place, last_features
from lowtide.stages.reconstruct import descend
from lowtide.validation import Count, NotNegative

PAPER_ITERS = 16_000
JUDGES = 4  # held-out batches that judge the student before and after
RECORD_EVERY = 250  # iterations
LARGEST_RATE = 0.02  # the largest share of itself that a scale changes by in one iteration
MERGED_CALLS = 20  # calls that a layer adds to an iteration while its change is learnt
STUDENT_BYTES = 40  # bytes of one weight while its change is learnt
# Names of records: the result, and the state in the middle of the loop.
STAGE = "Distill"
NETWORK = "network"
UNFINISHED = "leg"


@dataclass(frozen=True)
class Distill(Stage):
    """Train LoRA factors, weight scales and input scales with Adam and a rate that falls to zero.

    The result is kept if it is nearer to the float model on held-out images.

    rank: of the low-rank changes.
    ranges: learn the input scales.
    weight_rate, scale_rate, range_rate: rates at the paper's 16,000 iterations. The rate of a
        factor is a share of its layer's mean scale: Adam does not see how a gradient is scaled, so
        the scale must be in the rate. The rate of a scale is the share of itself that it changes
        by in one iteration.
    """

    whole: ClassVar[bool] = True
    reads: ClassVar[frozenset[str]] = frozenset({"iters", "batch"})

    rank: Count = 32
    ranges: bool = True
    weight_rate: NotNegative = 1 / 2500
    scale_rate: NotNegative = 1e-4
    range_rate: NotNegative = 1e-3

    def run(self, job: Job) -> None:
        student = Student(job, self)
        if student.layers or student.inputs:
            state = job.recorded(STAGE, NETWORK)
            if state is None:
                state = job.agreed(STAGE, NETWORK, DistillLoop(job, student).search())
            student.restore(state)
        set_precision(job.model, Precision.FULL)

    def cost(self, load: Workload) -> Cost:
        """Float answers to every call, then the whole network forward and backward.

        The low-rank changes are merged in each iteration.
        """
        whole = load.network.whole
        samples = min(load.settings.batch, load.calls * load.batch)
        merged = Work(
            product=self.rank * whole.weights,
            values=ROUND * whole.weights,
            calls=MERGED_CALLS * whole.layers,
        )
        work = whole.forward.of(samples) + rounding_inputs(whole, samples) + merged
        forward = load.speed.forward(work)
        kept = whole.kept + whole.reads + ATTENTION_COPIES * whole.scores
        student = BACKWARD_COPIES * FLOAT * samples * kept + STUDENT_BYTES * whole.weights
        answers = load.passes(load.calls) + 2 * JUDGES * forward
        seconds = answers + load.settings.iters * (forward + load.speed.backward(work))
        targets = 0 if load.apart else load.calls * load.batch * load.input_bytes[0]
        return Cost(seconds, SLACK * student + targets)

    def summary(self, job: Job) -> str:
        return "the whole network trained on the float model's answers"


class Student:
    """The parts of a quantized model that learn."""

    def __init__(self, job: Job, options: Distill):
        self.job = job
        self.options = options
        self.layers: dict[str, QuantizedLayer] = {
            name: layer for name, layer in quant_layers(job.model) if layer.format is not None
        }
        self.inputs: dict[str, Quantizer] = {
            name: quantizer
            for name, quantizer in quantizers(job.model).items()
            if isinstance(quantizer.format, Affine)
        }

    def start(self) -> list[dict[str, object]]:
        """Start to learn; groups of parameters for the optimizer, each with its first rate."""
        options = self.options
        faster = max(1.0, PAPER_ITERS / self.job.settings.iters) ** 0.75
        loras = [
            layer.start_lora(options.rank, self.job.generator(STAGE, name))
            for name, layer in self.layers.items()
        ]
        groups: list[dict[str, object]] = []
        for lora in loras:
            groups.append(_group([lora.down, lora.up], options.weight_rate * faster * lora.step()))
        # All inputs learn, if need be at no rate: one that does not learn would pass gradients of
        # values beyond its last code.
        scales = [quantizer.start_learning() for quantizer in self.inputs.values()]
        range_rate = min(LARGEST_RATE, options.range_rate * faster) if options.ranges else 0.0
        groups.append(_group(scales, range_rate))
        scale_rate = min(LARGEST_RATE, options.scale_rate * faster)
        groups.append(_group([lora.log_scale for lora in loras], scale_rate))
        return groups

    def finish(self) -> None:
        """Merge the changes into codes and tables."""
        for layer in self.layers.values():
            layer.finish_lora()
        for quantizer in self.inputs.values():
            quantizer.finish_learning()

    def state(self) -> dict[str, Tensor]:
        """Codes and scales of all layers, and the table of input scales."""
        codes: dict[str, Tensor] = {}
        scales: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            assert layer.codes is not None and layer.grid is not None
            codes[f"{name}.codes"] = layer.codes
            scales[f"{name}.scale"] = layer.grid.scale
        return codes | scales | {"ranges": find_clock(self.job.model).scale.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Set what `state` gives."""
        for name, layer in self.layers.items():
            assert layer.codes is not None and layer.grid is not None
            device = layer.codes.device
            layer.set_codes(state[f"{name}.codes"].to(device))
            layer.grid = layer.grid._replace(scale=state[f"{name}.scale"].to(device))
        find_clock(self.job.model).scale.copy_(state["ranges"])


def _group(parameters: list[nn.Parameter], rate: float) -> dict[str, object]:
    return {"params": parameters, "lr": rate, "first": rate}


class DistillLoop:
    """The training loop. It records its state, so an interrupted run resumes to the same bits."""

    def __init__(self, job: Job, student: Student):
        self.job = job
        self.student = student
        self.batches = CalibrationBatches(job)

    def search(self) -> dict[str, Tensor]:
        """The state after training or before it, whichever does better on held-out images."""
        start = self.student.state()
        before = self.judge()
        self.learn()
        self.student.finish()
        after = self.judge()
        self.job.report.setdefault("losses", {})[f"{STAGE} {NETWORK}"] = [before, after]
        return self.student.state() if after < before else start

    @torch.no_grad()
    def judge(self) -> float:
        """The distance to the float model on held-out batches, the same ones at each call."""
        set_precision(self.job.model, Precision.FULL)
        generator = self.job.generator(STAGE, "judge")
        held_out = self.batches.held_out
        batches = [self.batches.draw(held_out, generator) for _ in range(JUDGES)]
        own = sum(self.task_loss(batch).item() for batch in batches) / JUDGES
        return self.job.world.total(own)

    def learn(self) -> None:
        """Train, from the recorded state if there is one."""
        iters = self.job.settings.iters
        generator = self.job.generator(STAGE)
        optimizer = torch.optim.Adam(self.student.start())
        start = _resume(optimizer, generator, self.job.recorded(STAGE, UNFINISHED))
        for step in self.job.track(range(start, iters), "distilling", iters - start):
            for group in optimizer.param_groups:
                group["lr"] = group["first"] * (1 - step / iters)
            optimizer.zero_grad()
            loss = partial(self.loss, generator)
            learnt = _parameters(optimizer)
            descend(self.job, loss, learnt, optimizer.zero_grad, [generator])
            optimizer.step()
            if (step + 1) % RECORD_EVERY == 0:
                self.job.record(STAGE, UNFINISHED, _loop_state(optimizer, generator, step + 1))

    def loss(self, generator: torch.Generator) -> Tensor:
        """The loss on a random batch, with the job's terms if there are any."""
        if not self.job.terms:
            return self.task_loss(self.batches.draw(self.batches.training, generator))
        steps = max(term.steps for term in self.job.terms)
        return self.paired_loss(self.batches.windows(generator, steps), steps)

    def task_loss(self, batch: list[Place]) -> Tensor:
        """This rank's share of the distance of the student's answer from the float model's."""
        own = self.job.world.part(batch)
        if not own:
            return torch.zeros(())
        share = len(own) / len(batch)
        return self.job.room.mean(len(own), lambda span: share * self._task_part(own[span]))

    def _task_part(self, batch: Sequence[Place]) -> Tensor:
        return _distance(self.answer(batch), self.batches.targets(batch))

    def paired_loss(self, batch: list[Place], steps: int = 2) -> Tensor:
        """This rank's share of the loss with the job's terms, on images at consecutive steps.

        All steps are in one graph, so a term's gradient reaches the student through each of them.
        Where memory is short, the images are taken in parts.
        """
        size = len(batch) // steps
        windows = [batch[start : start + size] for start in range(0, len(batch), size)]
        own = [self.job.world.part(each) for each in windows]
        count = len(own[0])
        if not count:
            return torch.zeros(())

        def part(span: slice) -> Tensor:
            images = chain.from_iterable(each[span] for each in own)
            return count / size * self._paired_part(list(images), steps)

        return self.job.room.mean(count, part)

    def _paired_part(self, batch: Sequence[Place], steps: int) -> Tensor:
        with last_features(self.job) as features:
            with torch.no_grad():
                set_precision(self.job.model, Precision.FLOAT)
                self.answer(batch)
            set_precision(self.job.model, Precision.FULL)
            answer = self.answer(batch)
        theirs, ours = (x.reshape(steps, -1, *x.shape[1:]) for x in features)
        pairs = [(term, ours[: term.steps], theirs[: term.steps]) for term in self.job.terms]
        terms = sum(term.loss(mine, other) for term, mine, other in pairs)
        return _distance(answer, self.batches.targets(batch)) + terms

    def answer(self, batch: Sequence[Place]) -> Tensor:
        """The model's answer to a batch, at its precision now."""
        return answer_of(self.job.model(**self.batches.arguments(batch)))


def _distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """The squared error, summed over each sample and averaged over samples."""
    return (ours.float() - theirs.float()).square().flatten(1).sum(1).mean()


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    parameters: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def _loop_state(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, step: int
) -> dict[str, Tensor]:
    """Everything that the rest of the loop depends on."""
    state = {"step": torch.tensor(step), "generator": generator.get_state()}
    for number, parameter in enumerate(_parameters(optimizer)):
        state[f"{number}"] = parameter.detach()
        averages = optimizer.state[parameter].items()
        state |= {f"{number}.{name}": value for name, value in averages}
    return state


@torch.no_grad()
def _resume(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, state: dict[str, Tensor] | None
) -> int:
    """Set the loop to a recorded state; the step that comes next."""
    if state is None:
        return 0
    generator.set_state(state["generator"])
    for number, parameter in enumerate(_parameters(optimizer)):
        parameter.copy_(state[f"{number}"])
        for name in ("step", "exp_avg", "exp_avg_sq"):
            value = state.get(f"{number}.{name}")
            if value is not None:
                # Adam keeps its number of steps on the processor.
                device = value.device if name == "step" else parameter.device
                optimizer.state[parameter][name] = value.to(device)
    return int(state["step"])
