"""What a paper states and a changed line would break: each test kills one mutant of the audit."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from mpq_jobs import prepared
from tcaq_jobs import distance, started, uneven

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, tcaq
from lowtide.methods.mpq import PATCHES, divisors
from lowtide.methods.ptqd import CNC, VSC, Bias, StepAware
from lowtide.methods.tcaq import PAR, TCR
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.swap import quant_layers, set_precision
from lowtide.sampling import variance_calibration
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, Stage, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.distill import Distill, Student
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import layer_inputs, rounded_rows
from lowtide.stages.model_edits import fold_into_norm
from lowtide.stages.pack import Pack
from lowtide.stages.reconstruct import Learner


def test_tcr_divides_by_no_more_than_its_cut_and_by_no_less_than_one():
    """R = 2; without the cut some channels would be divided by more, without the floor by less."""
    job = started(uneven())
    layers = {name: layer for name, layer in quant_layers(job.model) if TCR().suits(layer)}
    uncut = {
        name: tcaq.reparameterization(inputs.peaks(), 0.05)
        for name, inputs in layer_inputs(job, layers, 64).items()
    }
    assert max(r.max() for r in uncut.values()) > 4
    assert min(r.min() for r in uncut.values()) < 0.95
    TCR(most=2.0).run(job)
    for name, layer in layers.items():
        assert torch.equal(layer.divisors, uncut[name].clamp(1.0, 2.0)), name


def test_what_folds_into_a_norm_divides_its_bias_too():
    model = tiny.model("unet-text")
    with torch.no_grad():
        model.mid_block.attentions[0].norm.bias.normal_(0, 3)
    job = Job(
        sampling.ModulePipeline(model, None, shape=()), model, adapt(model), Settings(), "test"
    )
    name = "mid_block.attentions.0.proj_in"
    norm, layer = model.mid_block.attentions[0].norm, model.mid_block.attentions[0].proj_in
    x = torch.randn(2, layer.in_channels, 4, 4)
    before = layer(norm(x))
    quantized = lowtide.nn.quantized.quantized_layer(
        layer, None, lowtide.nn.quantizer.Quantizer(None, None)
    )
    lowtide.nn.swap.replace_module(model, name, quantized)
    assert fold_into_norm(job, name, torch.linspace(1.0, 9.0, layer.in_channels))
    assert distance(quantized(norm(x)), before) < 1e-6


def test_omq_searches_with_inputs_on_the_grid_of_their_step():
    """Each row of X is on at most 2^bits values, and the grid is that of its own step."""
    job = prepared(inputs=4)
    name = "mid_block.resnets.0.conv1"
    layer = job.model.get_submodule(name)
    inputs = layer_inputs(job, {name: layer}, PATCHES)[name]
    layer.set_smooth(divisors(layer, inputs))
    exact, rounded = rounded_rows(layer, inputs)
    assert 0.01 < distance(rounded, exact) < 0.5
    smooth = layer.divisors
    for step in set(inputs.steps):
        rows = rounded[[place for place, other in enumerate(inputs.steps) if other == step]]
        assert len(rows.unique()) <= 16
        spread = (inputs.hi[step] / smooth).max() - (inputs.lo[step] / smooth).min()
        gaps = rows.unique().diff()
        assert gaps.min().item() == pytest.approx(spread.item() / 15, rel=1e-3)


def test_the_rate_of_lora_is_a_share_of_the_scale_of_its_weight():
    """The paper multiplies the gradient, which Adam does not see."""
    job = prepared(FitWeights("mse"), FitRanges("mse"))
    for number, (_, layer) in enumerate(quant_layers(job.model)):
        layer.grid = layer.grid._replace(scale=layer.grid.scale * (1 + number % 3))
    student = Student(job, Distill())
    groups = student.start()
    rates = {id(group["params"][0]): group["lr"] for group in groups}
    steps = {
        layer.rounding.step(): rates[id(layer.rounding.down)] for layer in student.layers.values()
    }
    assert max(steps) > 2 * min(steps)
    shares = [rate / step for step, rate in steps.items()]
    assert max(shares) == pytest.approx(min(shares), rel=1e-6)


@dataclass(frozen=True)
class Quieter(Stage):
    """Scale the last layer's output by 0.9: the noise is -0.1 times the answer."""

    def run(self, job):
        last = job.model.conv_out
        last.grid = last.grid._replace(scale=0.9 * last.grid.scale)


def test_a_negative_slope_corrects_nothing(monkeypatch):
    base = (Collect(), Assign(), FitWeights("minmax"), FitRanges("minmax"), Quieter())
    recipe = (*base, StepAware(), CNC(), Bias(), VSC(), Pack())
    monkeypatch.setitem(METHODS, "quieter", lambda settings: recipe)
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = lowtide.quantize(pipe, method="quieter", weights=8, steps=4, images=4)
    assert result.report["ptqd"]["slope"] == [0.0] * 4
    correction = result.model.get_submodule(variance_calibration.CORRECTION)
    assert not correction.slope.any() and correction.bias.any()


def test_each_round_of_par_has_half_the_iterations_of_the_one_before(monkeypatch):
    iters: dict[str, set[int]] = {}
    learn = Learner.learn

    def record(self, loss):
        iters.setdefault(self.stage, set()).add(self.iters)
        learn(self, loss)

    monkeypatch.setattr(Learner, "learn", record)
    job = started(tiny.model("unet2d"), iters=12)
    run_recipe((FitWeights("mse"), FitRanges("minmax"), PAR(rounds=3)), job)
    assert iters == {"Reconstruct1": {6}, "Reconstruct2": {3}, "Reconstruct3": {1}}
    set_precision(job.model, Precision.FULL)
    assert run_call(job, job.calls[0])[0].isfinite().all()
