"""The stream: one pass gives every unit the inputs and answers of whole forward passes."""

from dataclasses import replace

import pytest
import tiny
import tiny_pipelines
import torch

from lowtide import sampling
from lowtide.models import adapt
from lowtide.nn.precision import Precision
from lowtide.nn.quantizer import QDrop
from lowtide.nn.swap import find_clock, set_precision
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.reconstruct import Learner
from lowtide.stages.stream import Stream


def started(dtype: torch.dtype = torch.float32, **settings) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d").to(dtype))
    options = Settings(**{"steps": 3, "images": 4, "calibration_steps": 2, "batch": 4} | settings)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), options, "test")
    run_recipe((Collect(), Assign(per_step=True), FitWeights("minmax")), job)
    return job


def outputs_of(job: Job, name: str, quantized: bool) -> torch.Tensor:
    """A module's outputs in whole forward passes over the kept calls."""
    set_precision(job.model, Precision.of(weights=quantized, inputs=False))
    outputs: list[torch.Tensor] = []
    hook = job.model.get_submodule(name).register_forward_hook(
        lambda module, args, output: outputs.append(output)
    )
    for call in job.calls:
        if call.kept:
            run_call(job, call)
    hook.remove()
    return torch.cat(outputs)


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "on disk"])
def test_a_units_answers_and_inputs_are_those_of_whole_passes(memory):
    job = started(memory=memory)
    floats = {}
    inputs = {}
    for data in Stream(job).walk():
        (answers,) = data.targets.values()
        floats[data.unit.name] = torch.cat(
            [answers[place].clone() for place in range(len(answers))]
        )
        first = data.node.uses()[0]
        inputs[data.unit.name] = torch.cat([batch.clone() for batch in data.inputs[first].batches])
    for name, answer in floats.items():
        assert far(answer, outputs_of(job, name, quantized=False)) < 1e-6, name
    assert far(inputs["down_blocks.0.resnets.0"], outputs_of(job, "conv_in", quantized=True)) < 1e-6
    attention = outputs_of(job, "mid_block.attentions.0", quantized=True)
    assert far(inputs["mid_block.resnets.1"], attention) < 1e-6


def test_the_loss_is_computed_in_float32_for_a_model_in_half_precision():
    """In half precision most of the gradient of the mean square would be zero."""
    job = started(torch.float16)
    data = next(data for data in Stream(job).walk() if data.unit.name == "mid_block.resnets.1")
    learner = Learner(job, "test", data.unit, 1)
    set_precision(data.module, Precision.WEIGHTS)
    rounding = [layer.start_rounding() for layer in learner.layers.values()].pop()
    loss = data.loss(job.generator("test"))
    loss.backward()
    assert loss.dtype == torch.float32
    assert (rounding.values().grad == 0).float().mean() < 0.05


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Relative distance.

    A tape changes the memory layout, and a convolution may sum another layout in another order.
    """
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_every_unit_comes_once_and_in_forward_order():
    job = started()
    names = [data.unit.name for data in Stream(job).walk()]
    assert names == [unit.name for unit in job.adapter.units() if unit.kind != "temporal"]


def test_a_mixed_batch_answers_like_whole_passes():
    job = started()
    for data in Stream(job).walk():
        if data.unit.name == "mid_block.resnets.0":
            mixed = data.answer([5, 0, 6, 1])
            assert len(set(find_clock(job.model).index.tolist())) == 2
    whole = outputs_of(job, "mid_block.resnets.0", quantized=True)[[5, 0, 6, 1]]
    assert far(mixed, whole) < 1e-6


@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_a_dropped_rounding_leaves_the_float_input(chance):
    """QDrop at chance 1 is the block on float inputs, at 0 on quantized ones."""
    job = started(inputs=4, drop=0.5)
    FitRanges().run(job)
    for data in Stream(job, inputs_quantized=True).walk():
        if data.unit.name == "mid_block.resnets.1":
            drop = QDrop(chance, torch.Generator().manual_seed(0))
            ours = data.answer_to(data.gather([5, 0]), drop)
            floating = replace(data, inputs=data.floating).answer([5, 0])
            quantized = data.answer([5, 0])
    assert far(floating, quantized) > 1e-3
    assert far(ours, floating if chance else quantized) < 1e-6


def test_spilled_values_do_not_count_as_held():
    job = started(memory=0)
    stream = Stream(job)
    for _ in stream.walk():
        assert stream.store.held == 0
    assert stream.store.count > 0


@pytest.mark.parametrize("kind", ["unet2d", "dit"])
def test_a_units_loss_is_summed_over_channels_wherever_they_are(kind, tmp_path):
    """They are last where there are tokens, and second in an image.

    An error of one half in every value gives a quarter for each channel.
    """
    if kind == "dit":
        pipe = tiny_pipelines.dit(tmp_path)
        options = Settings(steps=3, images=4, calibration_steps=2, batch=4, labels=(1, 2))
        job = Job(pipe, pipe.transformer, adapt(pipe.transformer), options, "test")
        run_recipe((Collect(), Assign(per_step=True), FitWeights("minmax")), job)
    else:
        job = started()
    axes = set()
    for data in Stream(job).walk():
        (answer,) = data.targets
        shape = data.targets[answer][0].shape
        channels = shape[-1] if len(shape) == 3 else shape[1]
        data.answer_to = lambda batch, drop, id=answer: batch.targets[id] + 0.5
        assert data.loss(torch.Generator().manual_seed(0)).item() == pytest.approx(
            channels / 4, rel=1e-4
        )
        axes.add((len(shape), shape[1] == channels))
    assert (3, False) in axes if kind == "dit" else (4, True) in axes
