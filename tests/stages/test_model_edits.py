"""Model edits: the float answer stays, a skeleton is edited alike, a cache gives its values."""

import pytest
import tiny
import torch

from lowtide import runtime, sampling
from lowtide.checkpoint import diffusers_hook
from lowtide.formats import Adaptive, Affine, Grid
from lowtide.models import adapt
from lowtide.nn.plan import CachePlan, LayerPlan, Plan
from lowtide.nn.precision import Precision
from lowtide.nn.swap import find_clock, quantizers, set_precision, skeleton
from lowtide.settings import Settings
from lowtide.stages.assign import Assign
from lowtide.stages.base import Job, run_recipe
from lowtide.stages.collect import Collect
from lowtide.stages.fit_ranges import FitRanges, run_call
from lowtide.stages.fit_weights import FitWeights
from lowtide.stages.model_edits import cache_layer, correct_answer, smooth_layer, split_layers
from lowtide.stages.pack import Pack

FEATURE = "down_blocks.0.resnets.0.time_emb_proj"
SHORTCUT = "up_blocks.0.resnets.0.conv_shortcut"


def collected(**settings) -> Job:
    pipe = sampling.as_pipeline(tiny.model("unet2d"))
    options = Settings(**{"steps": 3, "images": 4, "calibration_steps": 2, "batch": 4} | settings)
    job = Job(pipe, pipe.unet, adapt(pipe.unet), options, "test")
    Collect().run(job)
    return job


def answer(job: Job, place: int = 1) -> torch.Tensor:
    return run_call(job, job.calls[place])[0]


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def reloaded(job: Job, call) -> torch.Tensor:
    """The answer of a skeleton made from the plan alone, with the packed model's tensors."""
    fresh = tiny.model("unet2d")
    with torch.device("meta"):
        skeleton(fresh, Plan.from_json(job.plan.to_json()))
    fresh.load_state_dict(job.model.state_dict(), assign=True)
    return fresh(**call.arguments)[0]


def packed(job: Job) -> torch.Tensor:
    call = job.calls[1]
    Pack().run(job)
    ours = job.model(**call.arguments)[0]
    assert torch.equal(reloaded(job, call), ours)
    return ours


def test_a_split_layer_answers_the_same_and_survives_the_checkpoint():
    job = collected()
    before = answer(job)
    split_layers(job, {SHORTCUT: 32})
    assert distance(answer(job), before) < 1e-6
    assert f"{SHORTCUT}.first" in job.adapter.layers()
    assert f"{SHORTCUT}.second" in job.adapter.layers()
    run_recipe((Assign(per_step=True), FitWeights(), FitRanges()), job)
    assert f"{SHORTCUT}.second" in job.plan.layers
    packed(job)


@pytest.mark.parametrize("weights", [4, 32])
def test_smoothing_moves_range_from_inputs_to_weights(weights):
    job = collected(weights=weights)
    before = answer(job)
    run_recipe((Assign(per_step=True),), job)
    name = "mid_block.resnets.0.conv1"
    layer = job.model.get_submodule(name)
    smooth_layer(job, name, torch.rand(layer.in_channels) * 3 + 0.5)
    x = torch.randn(2, layer.in_channels, 4, 4)
    layer.set_precision(Precision.FLOAT)
    theirs = layer(x)
    kept = layer.input.format
    layer.input.format = None
    layer.set_precision(Precision.INPUTS)
    assert distance(layer(x), theirs) < 1e-6  # divided and multiplied, nothing rounded
    layer.input.format = kept
    run_recipe((FitWeights(), FitRanges()), job)
    assert 1e-6 < distance(packed(job), before) < 0.3


def test_a_cache_of_every_step_replaces_the_layer():
    job = collected()
    run_recipe((Assign(per_step=True), FitWeights(), FitRanges()), job)
    width = job.model.get_submodule(FEATURE).out_features
    rows = torch.randn(3 * 2, width // 2)
    form = Affine(8)
    grid = form.params(rows.amin(1, keepdim=True), rows.amax(1, keepdim=True))
    values = form.decode(form.encode(rows.reshape(-1, width // 2), grid), grid).reshape(3, width)
    cached = cache_layer(job, FEATURE, CachePlan(width, form, chunks=2))
    cached.fill((rows / grid.scale + grid.zero).round().clamp(0, 255).to(torch.uint8), grid)
    clock = find_clock(job.model)
    for place, timestep in enumerate(clock.known):
        clock.set(timestep)
        assert torch.equal(cached(torch.zeros(2, 5)), values[place].expand(2, -1))
    clock.set(torch.tensor(list(clock.known)[::-1]))
    assert torch.equal(cached(torch.zeros(3, 5)), values.flip(0))
    rows_before = len(quantizers(job.model))
    packed(job)
    assert FEATURE not in job.plan.layers
    assert len(find_clock(job.model).scale) == rows_before - 1
    assert not any(name.startswith(f"{FEATURE}.layer") for name in job.model.state_dict())


def test_a_cache_of_some_steps_calls_the_layer_at_the_others():
    job = collected()
    run_recipe((Assign(per_step=True), FitWeights(), FitRanges()), job)
    layer = job.model.get_submodule(FEATURE)
    cached = cache_layer(job, FEATURE, CachePlan(layer.out_features, Affine(8), computed=True))
    cached.fill(
        torch.full((3, layer.out_features), 7, dtype=torch.uint8),
        Grid(torch.ones(3, 1), torch.full((3, 1), 5)),
    )
    cached.chosen = torch.tensor([True, False, True])
    clock = find_clock(job.model)
    clock.set(torch.tensor(list(clock.known)))
    x = torch.randn(3, layer.in_features)
    values = cached(x)
    assert torch.equal(values[[0, 2]], torch.full((2, layer.out_features), 2.0))
    assert torch.equal(values[1], layer(x)[1])
    set_precision(job.model, Precision.FLOAT)
    assert torch.equal(cached(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
    set_precision(job.model, Precision.FULL)
    packed(job)


def test_a_correction_takes_bias_and_slope_off_the_answer():
    job = collected()
    run_recipe((Assign(), FitWeights(), FitRanges()), job)
    before = answer(job)
    correction = correct_answer(job, 3)
    assert torch.equal(answer(job), before)
    correction.slope.copy_(torch.tensor([0.0, 1.0, 0.0]))
    correction.bias[1] = torch.tensor([0.5, 0.0, 0.0])
    expected = (before - torch.tensor([0.5, 0.0, 0.0]).reshape(1, 3, 1, 1)) / 2
    assert distance(answer(job), expected) < 1e-6
    packed(job)


def test_softmax_may_be_log2_at_some_steps():
    job = collected(inputs=4)
    Assign(per_step=True).run(job)
    name, parts = next(iter(job.plan.attentions.items()))
    softmax = LayerPlan(None, Adaptive(4), per_step=True)
    job.plan.attentions[name] = parts | {"softmax": softmax}
    quantizer = job.model.get_submodule(f"{name}.processor.softmax")
    quantizer.format = Adaptive(4)
    run_recipe((FitWeights(), FitRanges()), job)
    uniform = answer(job)
    grid = quantizer.format.params(torch.zeros(3), torch.ones(3))
    quantizer.take(quantizer.format.choose(grid, torch.ones(3), torch.tensor([False, True, False])))
    assert distance(answer(job), uniform) > 1e-4
    packed(job)


def test_the_hook_saves_and_loads_an_edited_model(tmp_path):
    job = collected()
    split_layers(job, {SHORTCUT: 32})
    run_recipe((Assign(per_step=True), FitWeights(), FitRanges()), job)
    correct_answer(job, 3).slope.fill_(0.1)
    call = job.calls[1]
    ours = packed(job)
    diffusers_hook.attach(job.model, job.plan)
    job.model.save_pretrained(tmp_path)
    again = type(job.model).from_pretrained(tmp_path)
    with runtime.plain(again):
        assert torch.equal(again(**call.arguments)[0], ours)
    halves = type(job.model).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert halves.lowtide_correction.slope.dtype == torch.float32
