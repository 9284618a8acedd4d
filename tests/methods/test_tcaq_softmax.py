"""DAQ of TCAQ-DM: each softmax takes log2 or uniform at each step, by its tail or by error."""

import io
import itertools

import pytest
import tiny
import torch
from rich.console import Console
from tcaq_jobs import OPTIONS, distance, started

from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.formats import Adaptive, Affine
from lowtide.methods import tcaq
from lowtide.methods.tcaq import DAQ
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.learn_ranges import LearnRanges


def test_daq_chooses_by_the_tail_at_each_step(monkeypatch):
    ratios = itertools.cycle((0.3, -0.2, 0.1))
    monkeypatch.setattr(tcaq, "power_law_wins", lambda *_: next(ratios))
    job = started(tiny.model("unet2d"), inputs=4, steps=6, calibration_steps=6)
    run_recipe((FitWeights(), FitRanges(), DAQ()), job)
    name = next(iter(job.plan.attentions))
    quantizer = job.model.get_submodule(f"{name}.processor.softmax")
    assert quantizer.format == Adaptive(4)
    assert job.plan.attentions[name]["softmax"].input == Adaptive(4)
    assert quantizer.clock.zero[quantizer.row].tolist() == [1, 0, 1, 1, 0, 1]
    assert job.report["daq"][name] == pytest.approx(4 / 6)


def alone(job: Job) -> float:
    """The error of the answers when softmax outputs alone are rounded."""
    set_precision(job.model, Precision.FLOAT)
    theirs = [run_call(job, call)[0] for call in job.calls]
    for name in job.plan.attentions:
        attention = job.model.get_submodule(name).processor
        attention.active = attention.softmax.enabled = True
    return sum(
        distance(run_call(job, call)[0], floating)
        for call, floating in zip(job.calls, theirs, strict=True)
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_daq_by_error_is_no_worse_than_uniform_or_by_law(bits):
    """On a trained model: the law says log2 nine times in ten, which is wrong at eight bits."""
    errors: dict[str, float] = {}
    for rule, stages in {"uniform": (), "law": (DAQ(),), "error": (DAQ(by="error"),)}.items():
        pipe = sampling.load_pipeline("zoo:digits")
        settings = Settings(
            **OPTIONS | {"steps": 6, "calibration_steps": 6}, weights=8, inputs=bits
        )
        job = Job(pipe, pipe.unet, adapt(pipe.unet), settings, "test")
        run_recipe(
            (Collect(), Assign(per_step=True), FitWeights("minmax"), FitRanges("mse"), *stages), job
        )
        errors[rule] = alone(job)
    assert errors["error"] < 1.1 * min(errors.values())
    assert (
        errors["law"] > 2 * errors["uniform"]
        if bits == 8
        else errors["law"] < 0.8 * errors["uniform"]
    )


@pytest.mark.parametrize("by", ["law", "error"])
def test_daq_by_either_rule_fits_every_step(by):
    job = started(tiny.model("unet2d"), inputs=4)
    run_recipe((FitWeights(), FitRanges(), DAQ(by=by)), job)
    for name in job.plan.attentions:
        quantizer = job.model.get_submodule(f"{name}.processor.softmax")
        log2 = quantizer.clock.zero[quantizer.row].bool()
        hi = quantizer.scale
        assert log2.float().mean() == pytest.approx(job.report["daq"][name])
        assert (torch.where(log2, hi, hi * quantizer.format.top) <= 1.0001).all()
    with pytest.raises(BadInput, match="found by 'luck'; expected law or error"):
        DAQ(by="luck")


def test_a_softmax_that_daq_leaves_uniform_at_every_step_can_still_be_learnt(monkeypatch):
    """And none of the log2 steps of an earlier choice stay behind."""
    job = started(tiny.model("unet2d"), inputs=4)
    run_recipe((FitWeights(), FitRanges("mse")), job)
    softmax = [job.model.get_submodule(f"{name}.processor.softmax") for name in job.plan.attentions]
    fitted = [quantizer.scale.clone() for quantizer in softmax]
    for log2, form in ((True, Adaptive(4)), (False, Affine(4))):
        monkeypatch.setattr(
            DAQ,
            "by_law",
            lambda _, rivals, log2=log2: torch.full_like(rivals.peak, log2, dtype=torch.bool),
        )
        DAQ().run(job)
        assert all(quantizer.format == form for quantizer in softmax)
        assert all(parts["softmax"].input == form for parts in job.plan.attentions.values())
    assert not any(quantizer.clock.zero[quantizer.row].any() for quantizer in softmax)
    run_recipe((FitRanges("mse"), LearnRanges(iters=5)), job)
    assert any(
        not torch.equal(quantizer.scale, before)
        for quantizer, before in zip(softmax, fitted, strict=True)
    )


def test_a_log2_softmax_lets_queries_and_keys_learn(monkeypatch):
    """Their ranges move where each softmax is log2 at every step: a gradient reaches them."""
    monkeypatch.setattr(
        DAQ, "by_law", lambda _, rivals: torch.ones_like(rivals.peak, dtype=torch.bool)
    )
    job = started(tiny.model("unet2d"), inputs=4)
    run_recipe((FitWeights("mse"), FitRanges(), DAQ()), job)
    moved = []
    finish = Quantizer.finish_learning
    heads = {job.model.get_submodule(name).processor.q for name in job.plan.attentions}

    def finished(self):
        if self in heads:
            moved.append(not torch.equal(self.learnt.exp(), self.scale))
        finish(self)

    monkeypatch.setattr(Quantizer, "finish_learning", finished)
    run_recipe((LearnRanges(iters=3),), job)
    assert len(moved) == len(heads) and all(moved)


def test_daq_says_that_there_is_nothing_to_choose():
    job = started(tiny.model("unet2d"), inputs=4, profile="tfmq")
    job.console = Console(file=io.StringIO(), width=200)
    DAQ().run(job)
    assert job.report["daq"] == {}
    assert "no softmax is quantized (profile full" in job.console.file.getvalue()
