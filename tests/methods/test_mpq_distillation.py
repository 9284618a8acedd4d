"""MPQ-DM's relation loss: it is the paper's, it reaches both steps, and it falls."""

import pytest
import torch
import torch.nn.functional as F
from mpq_jobs import prepared

from lowtide.methods.mpq import OMQ, TRD
from lowtide.nn.lora import LoRA
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
