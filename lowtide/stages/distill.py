"""Distill: teach the whole quantized network to answer like the float one; the second and last training loop in the house.

Learnt are low-rank changes of the weights (QALoRA), the scales of weights, and those of inputs, one for each step (TALSQ): the
clock's table is keyed by timestep, so nothing can fall out of step. Both models read the recorded calls, which lie on the
float model's own trajectory. An iteration costs one forward and backward pass of the student; the float answers are computed
once per call. Terms that stages announced before (job.terms) read pairs of consecutive steps and one float pass more.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lowtide.costs import FLOAT, Cost, Work, Workload
from lowtide.costs.workload import ATTENTION_COPIES, BACKWARD_COPIES, ROUND, SLACK, rounding_inputs
from lowtide.formats import Affine
from lowtide.nn.precision import Precision
from lowtide.nn.quantized import QuantizedLayer
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock, quant_layers, quantizers, set_precision
from lowtide.stages.base import Job, Stage
from lowtide.stages.batches import CalibrationBatches, answer_of, features
from lowtide.validation import Count, NotNegative

PAPER_ITERS, JUDGES, LEG = 16_000, 4, 250
MOST = 0.02  # the share of itself that a scale moves by in one step, at most
STAGE, NETWORK = "Distill", "network"
MERGED_CALLS = 20  # small calls that a layer adds to an iteration while its change is learnt
STUDENT_BYTES = 40  # bytes of one weight while its change is learnt


@dataclass(frozen=True)
class Distill(Stage):
    """LoRA factors, weight scales and input scales under Adam with a rate that falls to zero; kept if held-out images agree.

    Rates are those at the paper's 16,000 iterations. A factor's is a share of its layer's mean scale: Adam does not see how a
    gradient is scaled, so the scale has to be in the rate. A scale's rate is the share of itself that it moves in a step.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"iters", "batch"})

    rank: Count = 32
    ranges: bool = True
    weight_rate: NotNegative = 1 / 2500
    scale_rate: NotNegative = 1e-4
    range_rate: NotNegative = 1e-3

    def run(self, job: Job) -> None:
        student = Student(job, self)
        if student.layers or student.inputs:
            found = job.recorded(STAGE, NETWORK)
            if found is None:
                found = DistillLoop(job, student).search()
                job.record(STAGE, NETWORK, found)
            student.take(found)
        set_precision(job.model, Precision.FULL)

    def cost(self, load: Workload) -> Cost:
        """Float answers to every call, then the whole network forward and backward.

        The low-rank changes are merged in each iteration.
        """
        whole = load.network.whole
        samples = min(load.settings.batch, load.calls * load.batch)
        products = self.rank * whole.weights
        merged = Work(
            product=products, values=ROUND * whole.weights, calls=MERGED_CALLS * whole.layers
        )
        work = whole.forward.of(samples) + rounding_inputs(whole, samples) + merged
        forward = load.speed.forward(work)
        kept = whole.kept + whole.reads + ATTENTION_COPIES * whole.scores
        student = BACKWARD_COPIES * FLOAT * samples * kept + STUDENT_BYTES * whole.weights
        answers = load.passes(load.calls) + 2 * JUDGES * forward
        seconds = answers + load.settings.iters * (forward + load.speed.backward(work))
        return Cost(seconds, SLACK * student + load.calls * load.batch * load.input_bytes[0])


class Student:
    """What is learnt of a quantized model: how it starts, how it is written down, how it is taken up again."""

    def __init__(self, job: Job, options: Distill):
        self.job, self.options = job, options
        self.layers: dict[str, QuantizedLayer] = {
            name: layer for name, layer in quant_layers(job.model) if layer.format is not None
        }
        found = quantizers(job.model)
        self.inputs: dict[str, Quantizer] = {
            name: each for name, each in found.items() if isinstance(each.format, Affine)
        }

    def start(self) -> list[dict]:
        """Groups of parameters, each with the rate it starts at."""
        options, hurry = self.options, max(1.0, PAPER_ITERS / self.job.settings.iters) ** 0.75
        loras = [
            layer.start_lora(options.rank, self.job.generator(STAGE, name))
            for name, layer in self.layers.items()
        ]
        rates = [options.weight_rate * hurry * lora.step() for lora in loras]
        groups = [
            group([lora.down, lora.up], rate) for lora, rate in zip(loras, rates, strict=True)
        ]
        # All of them learn: one that does not passes gradients on beyond its last code too. Left out, they learn at no rate.
        learnt = [quantizer.start_learning() for quantizer in self.inputs.values()]
        groups.append(group(learnt, min(MOST, options.range_rate * hurry) * options.ranges))
        return [
            *groups,
            group([lora.log_scale for lora in loras], min(MOST, options.scale_rate * hurry)),
        ]

    def finish(self) -> None:
        """Merge: codes and tables are all that is left."""
        for layer in self.layers.values():
            layer.finish_lora()
        for quantizer in self.inputs.values():
            quantizer.finish_learning()

    def found(self) -> dict[str, Tensor]:
        codes = {f"{name}.codes": layer.codes for name, layer in self.layers.items()}
        scales = {f"{name}.scale": layer.grid.scale for name, layer in self.layers.items()}
        return codes | scales | {"ranges": find_clock(self.job.model).scale.clone()}

    def take(self, found: dict[str, Tensor]) -> None:
        for name, layer in self.layers.items():
            layer.set_codes(found[f"{name}.codes"].to(layer.codes.device))
            layer.grid = layer.grid._replace(scale=found[f"{name}.scale"].to(layer.codes.device))
        find_clock(self.job.model).scale.copy_(found["ranges"])


def group(parameters: list[nn.Parameter], rate: float) -> dict:
    return {"params": parameters, "lr": rate, "first": rate}


class DistillLoop:
    """The loop. It is recorded in legs, so that an interrupted run goes on from the last one, to the same bits."""

    def __init__(self, job: Job, student: Student):
        self.job, self.student, self.lessons = job, student, CalibrationBatches(job)

    def search(self) -> dict[str, Tensor]:
        """What was learnt, or what was there before, whichever is nearer to the float model on held-out images."""
        start, before = self.student.found(), self.judge()
        self.learn()
        self.student.finish()
        after = self.judge()
        self.job.report.setdefault("losses", {})[f"{STAGE} {NETWORK}"] = [before, after]
        return self.student.found() if after < before else start

    @torch.no_grad()
    def judge(self) -> float:
        """The distance to the float model on the same few held-out batches before and after."""
        set_precision(self.job.model, Precision.FULL)
        generator, lessons = self.job.generator(STAGE, "judge"), self.lessons
        batches = [lessons.some(lessons.held_out, generator) for _ in range(JUDGES)]
        return (
            sum(distance(self.answer(batch), lessons.targets(batch)).item() for batch in batches)
            / JUDGES
        )

    def learn(self) -> None:
        iters, generator = self.job.settings.iters, self.job.generator(STAGE)
        optimizer = torch.optim.Adam(self.student.start())
        start = resume(optimizer, generator, self.job.recorded(STAGE, "leg"))
        for step in self.job.track(range(start, iters), "distilling", iters - start):
            for each in optimizer.param_groups:
                each["lr"] = each["first"] * (1 - step / iters)
            optimizer.zero_grad()
            self.loss(generator).backward()
            optimizer.step()
            if (step + 1) % LEG == 0:
                self.job.record(STAGE, "leg", written(optimizer, generator, step + 1))

    def loss(self, generator: torch.Generator) -> Tensor:
        """The task on a random batch, and what terms add where there are any."""
        if not self.job.terms:
            batch = self.lessons.some(self.lessons.taught, generator)
            return distance(self.answer(batch), self.lessons.targets(batch))
        return self.paired_loss(self.lessons.pairs(generator))

    def paired_loss(self, batch: list[tuple[int, int]]) -> Tensor:
        """Both steps of a pair lie in one graph, so a term's gradient reaches the student through each of them."""
        with features(self.job) as heard:
            with torch.no_grad():
                set_precision(self.job.model, Precision.FLOAT)
                self.answer(batch)
            set_precision(self.job.model, Precision.FULL)
            answer = self.answer(batch)
        theirs, ours = (x.reshape(2, -1, *x.shape[1:]) for x in heard)
        return distance(answer, self.lessons.targets(batch)) + sum(
            term(ours, theirs) for term in self.job.terms
        )

    def answer(self, batch: list[tuple[int, int]]) -> Tensor:
        return answer_of(self.job.model(**self.lessons.arguments(batch)))


def distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """Squared error of the answer: summed over a sample, averaged over samples."""
    return (ours.float() - theirs.float()).square().flatten(1).sum(1).mean()


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for each in optimizer.param_groups for parameter in each["params"]]


def written(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, step: int
) -> dict[str, Tensor]:
    """Everything that the rest of the loop depends on."""
    found = {"step": torch.tensor(step), "generator": generator.get_state()}
    for place, parameter in enumerate(parameters(optimizer)):
        found[f"{place}"] = parameter.detach()
        found |= {f"{place}.{name}": value for name, value in optimizer.state[parameter].items()}
    return found


@torch.no_grad()
def resume(
    optimizer: torch.optim.Optimizer, generator: torch.Generator, found: dict[str, Tensor] | None
) -> int:
    """Go on from where a leg ended; at which step that is."""
    if found is None:
        return 0
    generator.set_state(found["generator"])
    for place, parameter in enumerate(parameters(optimizer)):
        parameter.copy_(found[f"{place}"])
        for name in ("step", "exp_avg", "exp_avg_sq"):
            if f"{place}.{name}" in found:
                value = found[f"{place}.{name}"]
                optimizer.state[parameter][name] = (
                    value if name == "step" else value.to(parameter.device)
                )
    return int(found["step"])
