"""TCAQ-DM: TCR flattens inputs and keeps the float answer, PAR learns on the quantized path."""

import pytest
import tiny
import torch
from tcaq_jobs import OPTIONS, distance, started, uneven

import lowtide
from lowtide import sampling
from lowtide.methods import METHODS, tcaq
from lowtide.methods.tcaq import DAQ, PAR, TCR
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quant_layers, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Call, Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.layer_error import layer_inputs, output_errors
from lowtide.stages.reconstruct import Learner
from lowtide.stages.stream import Stream


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
            errors[cut] = float(next(output_errors(layer, inputs[name], [layer.format])).sum())
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
