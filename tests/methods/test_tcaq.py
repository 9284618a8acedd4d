"""TCAQ-DM: TCR flattens inputs, DAQ follows the tail, PAR learns on the quantized path."""

import io
import itertools

import pytest
import tiny
import torch
from rich.console import Console

import lowtide
from lowtide import sampling
from lowtide.errors import BadInput
from lowtide.formats import Adaptive, Affine
from lowtide.methods import METHODS, tcaq
from lowtide.methods.tcaq import DAQ, PAR, TCR
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import Quantizer
from lowtide.nn.swap import find_clock, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import layer_inputs, lost
from lowtide.stages.reconstruct import Learner, LearnRanges
from lowtide.stages.stream import Stream

OPTIONS = {"steps": 4, "images": 2, "calibration_steps": 4, "iters": 10, "batch": 2}


def started(model, **options) -> Job:
    pipe = (
        sampling.as_pipeline(model)
        if hasattr(model, "config") and "down_block_types" in model.config
        else None
    )
    job = Job(pipe, model, adapt(model), Settings(**OPTIONS | options), "test")
    run_recipe((Collect(), Assign(per_step=True)), job)
    return job


def uneven(seed: int = 0):
    """A tiny UNet with a few heavy channels, as trained ones have."""
    model = tiny.model("unet2d", seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight[::5] *= 12
    return model


def distance(ours, theirs) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_r_is_weighed_by_peaks_over_time():
    peaks = torch.tensor([[1.0, 2.0, 4.0], [10.0, 10.0, 80.0]])
    r = tcaq.reparameterization(peaks, lowest=0.0)
    assert torch.allclose(r, torch.tensor([1.0, (2 * 2 + 10 * 1) / 12, (4 * 4 + 80 * 8) / 84]))
    assert torch.equal(tcaq.grouped(peaks, 1), torch.tensor([[10.0, 10.0, 80.0]]))
    dead = tcaq.reparameterization(torch.tensor([[0.0, 1.0, 2.0, 2.0]]), lowest=0.0)
    assert dead.isfinite().all()


def test_tcr_keeps_the_float_answer_and_flattens_the_inputs():
    job = started(uneven())
    before = run_call(job, job.calls[0])[0]
    layers = {name: layer for name, layer in quant_layers(job.model) if TCR().suits(layer)}
    old = {name: inputs.peaks() for name, inputs in layer_inputs(job, layers, 64).items()}
    TCR(most=100.0).run(job)
    set_precision(job.model, Precision.FLOAT)
    assert distance(run_call(job, job.calls[0])[0], before) < 1e-5
    wide = [name for name, layer in layers.items() if layer.in_channels >= 16]
    spread = sum(old[name].log().std(1).mean() for name in wide)
    assert (
        sum((old[name] / layers[name].smooth).log().std(1).mean() for name in wide) < 0.7 * spread
    )
    assert job.report["tcr"]["layers"] == len(layers) > 8


def test_each_layer_takes_the_cut_that_leaves_it_the_least_error():
    job = started(uneven(), weights=4, inputs=4)
    layers = {name: layer for name, layer in quant_layers(job.model) if TCR().suits(layer)}
    inputs = layer_inputs(job, layers, 64)
    for name, layer in layers.items():
        r = tcaq.reparameterization(inputs[name].peaks(), 0.05)
        chosen = tcaq.best_cut(layer, inputs[name], r)
        errors: dict[float, float] = {}
        assert not layer.smooth.numel()
        for cut in tcaq.CUTS:
            layer.set_smooth(r.clamp(1.0, cut))
            errors[cut] = float(next(lost(layer, inputs[name], [layer.format])).sum())
        layer.set_smooth(r.new_empty(0))
        assert errors[chosen] == min(errors.values())


def test_a_layer_that_gains_nothing_keeps_no_table():
    """With 8-bit inputs there is little to gain, and 2-bit weights have nothing to give."""
    job = started(uneven(), weights=2, inputs=8)
    TCR().run(job)
    cuts = job.report["tcr"]["cuts"]
    assert 1.0 in cuts.values()
    assert all(
        not job.model.get_submodule(name).smooth.numel() for name, cut in cuts.items() if cut == 1
    )


def test_tcr_folds_into_a_norm_only_where_that_is_exact():
    model = tiny.model("unet-text")
    adapter = adapt(model)
    assert adapter.norm_before("mid_block.attentions.0.proj_in") == "mid_block.attentions.0.norm"
    assert adapter.norm_before("mid_block.resnets.0.conv1") is None  # a SiLU stands between
    assert (
        adapter.norm_before("mid_block.attentions.0.transformer_blocks.0.attn1.to_q") is None
    )  # three listeners


def test_tcr_lowers_the_error_of_a_trained_model():
    errors: dict[str, float] = {}
    floating = sampling.load_pipeline("zoo:digits").unet
    for name, stages in {"with": (TCR(),), "without": ()}.items():
        pipe = sampling.load_pipeline("zoo:digits")
        job = Job(
            pipe,
            pipe.unet,
            adapt(pipe.unet),
            Settings(
                **OPTIONS | {"steps": 10, "images": 4, "calibration_steps": 10}, weights=8, inputs=4
            ),
            "test",
        )
        run_recipe((Collect(), Assign(per_step=True), *stages, FitWeights("mse"), FitRanges()), job)
        # Without the last call: little noise is left to predict, and every relative error is large.
        errors[name] = sum(
            distance(run_call(job, call)[0], floating(**call.arguments)[0])
            for call in job.calls[:-1]
        )
    assert errors["with"] < 0.9 * errors["without"]


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
    job = started(tiny.model("unet2d"), inputs=4, profile="paper")
    job.console = Console(file=io.StringIO(), width=200)
    DAQ().run(job)
    assert job.report["daq"] == {}
    assert "no attention is quantized (profile full" in job.console.file.getvalue()


def x_t(call: Call) -> torch.Tensor:
    return call.arguments["sample"]


@pytest.mark.parametrize("drop", [None, 0.5])
def test_rounds_learn_on_the_quantized_path_start_warm_and_leave_ranges_alone(monkeypatch, drop):
    job = started(tiny.model("unet2d"), inputs=4, drop=drop)
    run_recipe((FitWeights("mse"), FitRanges("minmax"), DAQ()), job)
    clock = find_clock(job.model)
    floating = job.calls
    tables = (clock.scale.clone(), clock.zero.clone())
    inputs: list[list[torch.Tensor]] = []
    warm: list[bool] = []
    feed = Stream.feed
    search = Learner.search
    monkeypatch.setattr(
        Stream,
        "feed",
        lambda self: (inputs.append([call.arguments["sample"] for call in self.calls]), feed(self))[
            1
        ],
    )
    monkeypatch.setattr(
        Learner, "search", lambda self, loss: (warm.append(self.warm), search(self, loss))[1]
    )
    PAR().run(job)
    assert len(inputs) == 2 and all(warm) and len(warm) > 10
    kept = [x_t(call) for call in floating if call.kept]
    for path in inputs:
        assert torch.equal(path[0], kept[0])  # from the same noise
        assert all(
            distance(ours, theirs) > 1e-3 for ours, theirs in zip(path[1:], kept[1:], strict=True)
        )
    assert any(not torch.equal(first, second) for first, second in zip(*inputs, strict=True))
    assert job.calls is floating
    assert torch.equal(clock.scale, tables[0]) and torch.equal(clock.zero, tables[1])


def test_later_rounds_change_what_the_first_decided():
    """If the penalty froze a warm start, no rounding would change, nor any unit's loss."""
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    losses = lowtide.quantize(pipe, method="tcaq", **OPTIONS | {"iters": 60}).report["losses"]
    again = [pair for name, pair in losses.items() if name.startswith("Reconstruct1 ")]
    assert sum(after < before for before, after in again) > len(again) / 2
    assert sum(min(pair) for pair in again) < 0.97 * sum(before for before, _ in again)


def test_sixteen_bits_change_nothing():
    original = tiny.model("unet2d")
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    lowtide.quantize(pipe, method="tcaq", weights=32, inputs=32, **OPTIONS)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pipe.unet(x, 750)[0], original(x, 750)[0])


def test_what_is_saved_is_what_is_loaded(tmp_path):
    result = lowtide.quantize(sampling.as_pipeline(uneven()), method="tcaq", inputs=4, **OPTIONS)
    request = sampling.Request(steps=4, seeds=(0, 1))
    before = sampling.images(result.pipe, request)
    result.save(tmp_path / "packed")
    assert (sampling.images(lowtide.load(tmp_path / "packed"), request) == before).all()
    assert any(plan.smooth for plan in result.plan.layers.values())


def test_a_stage_can_be_left_out_by_name():
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    result = lowtide.quantize(pipe, method="tcaq", without=("tcr", "PAR"), **OPTIONS)
    assert not any(plan.smooth for plan in result.plan.layers.values())
    with pytest.raises(
        lowtide.errors.BadInput,
        match="found no stage 'tiar2'; expected one of Collect, Assign, TCR",
    ):
        lowtide.quantize(
            sampling.as_pipeline(tiny.model("unet2d")), method="tcaq", without=("tiar2",), **OPTIONS
        )
    assert "tcaq" in METHODS
