"""MPQ-DM's relation loss: it is the paper's, it reaches both steps, and it falls."""

import time

import pytest
import tiny
import torch
import torch.nn.functional as F
from mpq_jobs import prepared

from lowtide.costs import Network, Workload, measured
from lowtide.errors import BadInput
from lowtide.methods.mpq import OMQ, TRD
from lowtide.models import adapt
from lowtide.nn.lora import LoRA
from lowtide.settings import Settings
from lowtide.stages import relation_loss
from lowtide.stages.base import Term
from lowtide.stages.distill import Distill, DistillLoop, Student
from lowtide.stages.fit_ranges import FitRanges
from lowtide.stages.fit_weights import FitWeights


def test_relations_are_the_papers():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 5, 7, generator=generator)
    term = TRD(weight=2.0, temperature=0.5)
    total = 0.0
    for sample_number in range(3):
        tables = []
        for feature in (ours, theirs):
            f = F.normalize((feature[0, sample_number] + feature[1, sample_number]) / 2, dim=0)
            tables.append(torch.softmax(f.T @ f / 0.5, -1))
        total += (tables[1] * (tables[1] / tables[0]).log()).sum().item()
    assert term.loss(ours, theirs).item() == pytest.approx(2 * total / 3, rel=1e-4)
    assert term.loss(theirs, theirs).abs().item() < 1e-5


def test_relations_of_a_half_precision_model_are_those_of_float32():
    """Computed in bf16, a loss of 0.4 came out as 1.3."""
    torch.manual_seed(0)
    theirs = torch.randn(2, 1, 32, 1024).bfloat16()
    ours = (theirs + 0.05 * torch.randn(2, 1, 32, 1024)).bfloat16()
    whole = TRD().loss(ours.float(), theirs.float())
    assert TRD().loss(ours, theirs).item() == pytest.approx(whole.item(), rel=1e-3)


def distillation(**settings) -> tuple[DistillLoop, Student]:
    job = prepared(OMQ(), FitWeights("mse"), FitRanges("mse"), **settings)
    student = Student(job, Distill())
    return DistillLoop(job, student), student


def test_the_relation_loss_reaches_the_factors_through_both_steps():
    loop, student = distillation()
    student.start()
    loop.job.terms.append(Term(lambda ours, theirs: ours.sum() * 0))
    batch = loop.batches.windows(torch.Generator().manual_seed(0))
    gradients = {}
    for step in (0, 1):
        # Only the feature of one of the two steps keeps its graph.
        def term(ours, theirs, step=step):
            kept = torch.stack(
                [each if place == step else each.detach() for place, each in enumerate(ours)]
            )
            return 1e6 * TRD().loss(kept, theirs)

        loop.job.terms[:] = [Term(term)]
        loras = [module for module in loop.job.model.modules() if isinstance(module, LoRA)]
        for lora in loras:
            lora.zero_grad()
        loop.paired_loss(batch).backward()
        gradients[step] = torch.cat(
            [lora.up.grad.flatten() for lora in loras[:-1] if lora.up.grad is not None]
        )
        assert sum(
            lora.up.grad is not None and lora.up.grad.abs().sum() > 0 for lora in loras
        ) > 0.9 * len(loras)
    loop.job.terms[:] = [Term(lambda ours, theirs: 0.0)]
    for lora in loras:
        lora.zero_grad()
    loop.paired_loss(batch).backward()
    task = torch.cat([lora.up.grad.flatten() for lora in loras[:-1] if lora.up.grad is not None])
    assert (gradients[0] - task).norm() > 10 * task.norm()
    assert (gradients[1] - task).norm() > 10 * task.norm()
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[0].norm()


def test_the_total_and_the_relation_fall():
    loop, _ = distillation(iters=30)
    relation: list[torch.Tensor] = []
    totals: list[torch.Tensor] = []
    trd = TRD()
    loss = DistillLoop.loss

    def term(ours, theirs):
        relation.append(trd.loss(ours, theirs))
        return relation[-1]

    loop.job.terms.append(Term(term))
    loop.loss = lambda generator: (
        totals.append(loss(loop, torch.Generator().manual_seed(len(totals) % 3))),
        totals[-1],
    )[1]
    loop.learn()
    first = slice(0, 3)
    last = slice(-3, None)
    assert sum(totals[last]).item() < 0.7 * sum(totals[first]).item()
    assert sum(relation[last]).item() < 0.9 * sum(relation[first]).item()


@pytest.mark.parametrize("steps", [1, 3])
def test_relations_of_any_number_of_steps(steps):
    """N = 3 averages three features; N = 1 compares one."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, steps, 2, 5, 7, generator=generator)
    averages = (ours.mean(0, keepdim=True), theirs.mean(0, keepdim=True))
    assert torch.allclose(TRD().loss(ours, theirs), TRD().loss(*averages), rtol=1e-5)
    assert TRD().loss(ours, theirs) > 0


def test_all_n_steps_reach_the_student():
    loop, _ = distillation(batch=6)
    shapes: list[tuple[int, ...]] = []
    real = TRD(window=3)
    real.run(loop.job)
    (term,) = loop.job.terms
    assert term.steps == 3

    def watched(ours, theirs):
        shapes.append(tuple(ours.shape[:2]))
        return term.loss(ours, theirs)

    loop.job.terms[:] = [Term(watched, 3), Term(lambda ours, theirs: ours.sum() * 0, 2)]
    assert loop.loss(torch.Generator().manual_seed(0)).isfinite()
    assert shapes == [(3, 2)]
    batch = loop.batches.windows(torch.Generator().manual_seed(0), 3)
    times = [loop.batches.calls[call].timestep for call, _ in batch]
    assert times[0] > times[2] > times[4]
    with pytest.raises(BadInput, match="found 4 steps; expected at least 5"):
        TRD(window=5).check(Settings(steps=4))
    with pytest.raises(BadInput, match="found 4 steps; expected at least 5"):
        loop.batches.windows(torch.Generator(), 5)


def test_tables_in_parts_have_the_same_value_and_gradient(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 2, 3, 5, 64, generator=generator)
    results = []
    for most in (1 << 24, 3 * 64 * 7):  # 7 rows at a time, the last time 1
        monkeypatch.setattr(relation_loss, "MOST_RELATIONS", most)
        variable = ours.clone().requires_grad_()
        loss = TRD().loss(variable, theirs)
        loss.backward()
        results.append((loss.detach(), variable.grad))
    assert relation_loss.table_rows(3, 64) == 7
    assert torch.allclose(results[0][0], results[1][0], rtol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)


def test_tables_are_bounded_and_the_plan_counts_them():
    """At 128 x 128 latents, one whole table of one sample is 1 GiB, and six copies of it are 6."""
    rows = relation_loss.table_rows(1, 128 * 128)
    assert rows == 1024 and 4 * rows * 128**2 == 64 << 20
    assert relation_loss.table_rows(8, 1024) == 1024
    network = Network(adapt(tiny.model("unet2d")))
    speed = measured(network, time.process_time)
    load = Workload(network, Settings(steps=4, batch=8, iters=10), speed, steps=4, branches=1)
    cost = TRD().cost(load)
    held = Distill().cost(load).bytes
    # Pairs: 4 samples of 8 x 8 positions, six copies of tables in float32.
    assert cost.bytes - held == 4 * 6 * 4 * 64 * 64
    assert cost.seconds > 10 * load.forward(network.whole, 8)
