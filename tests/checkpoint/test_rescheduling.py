"""Another schedule: the same one changes no bit, a new one has the float block's own features."""

import json

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline
from test_cli import assert_one_sentence, lowtide  # noqa: F401

import lowtide as face
from lowtide import sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn.feature_cache import Cached
from lowtide.nn.swap import find_clock
from lowtide.stages.temporal_features import TemporalFeatures, temporal_errors
from lowtide.workflows import to_folder

# Eight bits, so that errors of the weights do not hide those of the schedule.
QUICK = {"weights": 8, "steps": 8, "images": 2, "calibration_steps": 2, "iters": 4, "batch": 2}
SEEDS = (5, 6, 7)


def time_sensitive() -> DDIMPipeline:
    """A tiny model whose temporal features are as large as a trained model's."""
    model = tiny.model("unet2d")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith("time_emb_proj"):
                layer.weight.mul_(6)
    return DDIMPipeline(model, DDIMScheduler())


def images(pipe, steps, seeds=SEEDS, **options):
    return sampling.images(pipe, sampling.Request(steps=steps, seeds=seeds, **options))


def quantized(method, home, **options):
    """A packed folder, and the float pipeline it was made from."""
    pipe = time_sensitive()
    pipe.save_pretrained(home / "float")
    to_folder.quantize_to_folder(str(home / "float"), home / method, method, QUICK | options)
    return home / method


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return quantized("temporal_cache", tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def float_block(tmp_path_factory):
    """The block that computes features has its own weights, not 8 bits."""
    home = tmp_path_factory.mktemp("float_block")
    return quantized("temporal_cache", home, stages={"maintain": {"block": 16}})


@pytest.fixture(scope="module")
def float_inputs(tmp_path_factory):
    """Inputs and caches in float: only rounded weights and the schedule change these images."""
    return quantized(
        "temporal_cache",
        tmp_path_factory.mktemp("float_inputs"),
        inputs=16,
        stages={"maintain": {"bits": 32, "block": 16}},
    )


@pytest.fixture(scope="module")
def tfmq(tmp_path_factory):
    return quantized("tfmq", tmp_path_factory.mktemp("tfmq"))


def difference(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def tables(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["kept", "tfmq"])
def test_the_same_steps_change_no_bit(name, request):
    folder = request.getfixturevalue(name)
    pipe = face.load(folder)
    before = tables(pipe.unet)
    plan = facts.packed_plan(pipe.unet)
    drawn = images(pipe, 8)
    result = face.reschedule(pipe, 8)
    after = tables(pipe.unet)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[each], after[each]) for each in before)
    assert result.plan == plan and result.report["farthest"] == 0
    assert np.array_equal(images(pipe, 8), drawn)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_features_are_the_float_blocks_own_at_the_new_timesteps(float_block, steps):
    pipe = face.load(float_block)
    result = face.reschedule(pipe, steps)
    assert list(result.plan.timesteps) == [int(t) for t in pipe.scheduler.timesteps]
    assert len(result.plan.timesteps) == steps
    assert off_float(float_block, pipe).max() < 0.01


@pytest.mark.parametrize("block", ["kept", "float_block"])
def test_features_are_those_of_a_model_quantized_for_the_schedule(block, request, tmp_path):
    folder = request.getfixturevalue(block)
    options = {"steps": 5, "stages": {"maintain": {"block": 8 if block == "kept" else 16}}}
    anew = face.load(quantized("temporal_cache", tmp_path, **options))
    ours = face.load(folder)
    face.reschedule(ours, 5)
    assert facts.packed_plan(ours.unet).times == facts.packed_plan(anew.unet).times
    compared = 0
    for name, module in ours.unet.named_modules():
        if isinstance(module, Cached):
            compared += 1
            other = anew.unet.get_submodule(name)
            assert torch.equal(module.weight, other.weight)
            assert torch.equal(module.scale, other.scale) and torch.equal(module.zero, other.zero)
    assert compared > 3


def off_float(folder, pipe):
    """Relative L2 of each temporal feature to the float model's: (timesteps, features)."""
    original = DiffusionPipeline.from_pretrained(folder.parent / "float").unet
    adapter = adapt(original)
    rows = [{"timestep": timestep} for timestep in find_clock(pipe.unet).timesteps]
    floating = TemporalFeatures(adapter, adapter.temporal()[0], rows)(original)
    sizes = torch.stack([feature.double().square().sum(1) for feature in floating], 1)
    return (temporal_errors(adapter, original, pipe.unet) / sizes).sqrt()


def test_eight_bits_are_as_near_as_eight_bits_were(kept):
    """Ranges are searched again: the error at new timesteps is that at the calibrated ones."""
    pipe = face.load(kept)
    before = off_float(kept, pipe).mean()
    face.reschedule(pipe, 20)
    assert off_float(kept, pipe).mean() < 1.2 * before


@pytest.mark.parametrize("steps", [3, 5])
def test_images_are_nearer_to_float_than_with_the_features_of_neighbours(float_inputs, steps):
    floating = images(time_sensitive(), steps)
    ours = face.load(float_inputs)
    borrowed = face.load(float_inputs)
    face.reschedule(ours, steps)
    borrow(borrowed, steps)
    error = difference(images(ours, steps), floating)
    assert error < 0.2 * difference(images(borrowed, steps), floating)


def test_a_cache_of_floats_is_the_float_block(float_inputs):
    pipe = face.load(float_inputs)
    face.reschedule(pipe, 20)
    assert off_float(float_inputs, pipe).max() < 1e-6


def borrow(pipe, steps):
    """Reschedule, and then use every cached feature of the nearest old timestep."""
    rows = {
        name: module.cached(torch.arange(8))
        for name, module in pipe.unet.named_modules()
        if isinstance(module, Cached)
    }
    old = torch.tensor(facts.packed_plan(pipe.unet).timesteps)
    face.reschedule(pipe, steps)
    nearest = (find_clock(pipe.unet).timesteps[:, None] - old).abs().argmin(1)
    for name, feature in rows.items():
        pipe.unet.get_submodule(name).take(feature[nearest])


def test_a_method_without_a_cache_interpolates_its_ranges(tfmq, tmp_path):
    pipe = face.load(tfmq)
    clock = find_clock(pipe.unet)
    scale = clock.scale.clone()
    zero = clock.zero.clone()
    old = list(clock.known)
    result = face.reschedule(pipe, 20)
    assert result.report["features"] == 0 and 0 < result.report["farthest"] <= 125
    assert clock.scale.shape == (len(scale), 20)
    for place, timestep in enumerate(result.plan.timesteps):
        above = min((each for each in old if each >= timestep), default=max(old))
        below = max(each for each in old if each <= timestep)
        share = (timestep - below) / (above - below) if above > below else 0.0
        columns = [old.index(below), old.index(above)]
        line = scale[:, columns] @ torch.tensor([1 - share, share])
        assert torch.allclose(clock.scale[:, place], line, rtol=1e-6)
        lows, highs = zero[:, columns].aminmax(dim=1)
        assert (lows <= clock.zero[:, place]).all() and (clock.zero[:, place] <= highs).all()
    again = face.load(result.save(tmp_path / "twenty"))
    assert np.array_equal(images(again, 20), images(pipe, 20))


def test_corrections_go_along(tmp_path):
    result = face.quantize(
        time_sensitive(),
        method="ptqd",
        without=("reconstruct", "learnranges", "stepaware"),
        **QUICK,
    )
    correction = result.model.lowtide_correction
    bias = correction.bias.clone()
    changed = face.reschedule(result, 4)
    old = list(result.plan.timesteps)
    assert [old.index(timestep) for timestep in changed.plan.timesteps] == [1, 3, 5, 7]
    assert torch.equal(correction.bias, bias[1::2])
    assert len(correction.slope) == len(correction.noise) == 4
    folder = changed.save(tmp_path / "four")
    assert np.array_equal(images(face.load(folder), 4), images(changed.pipe, 4))


def test_a_label_is_answered_by_request_on_the_new_schedule(tmp_path):
    options = tiny_pipelines.request_fields("dit")
    pipe = tiny_pipelines.dit(tmp_path)
    result = face.quantize(pipe, method="temporal_cache", **QUICK | {"steps": 3}, **options)
    images(pipe, 3, (5,), **options)
    changed = face.reschedule(result, 4)
    assert changed.plan.requests and len(changed.plan.times) == 4
    drawn = images(pipe, 4, (5,), **options)
    again = face.load(changed.save(tmp_path / "four"))
    assert np.array_equal(images(again, 4, (5,), **options), drawn)


def test_a_new_scheduler_is_a_new_schedule(float_inputs):
    pipe = face.load(float_inputs)
    floating = time_sensitive()
    pipe.scheduler = DDIMScheduler(timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="input ranges are interpolated"):
        at_once = images(pipe, 8)
    result = face.reschedule(pipe, 8)
    assert result.plan.timesteps[0] == 999
    floating.scheduler = pipe.scheduler
    assert difference(images(pipe, 8), images(floating, 8)) < 0.2
    assert difference(images(pipe, 8), at_once) < 1e-5


def fails(*args, **kwargs):
    raise ValueError("in the middle")


def test_a_sampler_that_fails_leaves_the_model_as_it_was(kept, monkeypatch):
    pipe = face.load(kept)
    before = tables(pipe.unet)
    forward = vars(pipe.unet)["forward"]
    drawn = images(pipe, 8)
    with pytest.raises(BadInput, match="found 2000 steps; expected at most 1000"):
        face.reschedule(pipe, 2000)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="in the middle"):
        patch.setattr(pipe.scheduler, "step", fails)
        face.reschedule(pipe, 4)
    assert all(torch.equal(tensor, pipe.unet.state_dict()[name]) for name, tensor in before.items())
    assert vars(pipe.unet)["forward"] is forward
    assert find_clock(pipe.unet).keyed
    assert np.array_equal(images(pipe, 8), drawn)


def test_without_the_block_it_is_an_error():
    result = face.quantize(time_sensitive(), method="temporal_cache", only_schedule=True, **QUICK)
    words = r"cached temporal features without .*; .*without --only-schedule, or with --steps 5"
    with pytest.raises(BadInput, match=words):
        face.reschedule(result, 5)


def test_where_nothing_depends_on_the_step_there_is_nothing_to_do():
    result = face.quantize(time_sensitive(), method="minmax", **relevant_options("minmax", QUICK))
    with pytest.raises(
        BadInput, match=r"nothing depends on the step; .*; sample it with --steps 5 as it is"
    ):
        face.reschedule(result, 5)
    with pytest.raises(
        BadInput, match=r"no model that lowtide packed; .*; quantize it with --steps 5"
    ):
        face.reschedule(time_sensitive(), 5)
    with pytest.raises(BadInput, match="found steps 0"):
        face.reschedule(result, 0)


def test_the_command_line_from_error_to_images(lowtide, kept, tmp_path):  # noqa: F811
    ended = lowtide("sample", kept, "--seeds", "3", "--out", tmp_path / "x", "--json")
    assert ended.code == 0 and json.loads(ended.out)["steps"] == 8
    with pytest.warns(UserWarning, match="input ranges are interpolated"):
        ended = lowtide("sample", kept, "--steps", 5, "--seeds", "3", "--out", tmp_path / "y")
    assert ended.code == 0 and "1 images of 5 steps" in ended.out
    ended = lowtide("reschedule", kept, "--steps", 5, "--out", tmp_path / "five", "--json")
    assert ended.code == 0, ended.err
    result = json.loads(ended.out)
    features = sum(isinstance(module, Cached) for module in face.load(kept).unet.modules())
    assert (result["from"], result["steps"], result["features"]) == (8, 5, features)
    assert features > 3
    assert result["timesteps"] == [800, 600, 400, 200, 0] and result["farthest"] == 50
    ours = face.load(kept)
    face.reschedule(ours, 5)
    assert np.array_equal(
        images(DiffusionPipeline.from_pretrained(tmp_path / "five"), 5), images(ours, 5)
    )
    ended = lowtide("evaluate", tmp_path / "five", "--seeds", "3", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["request"]["steps"] == 5
    ended = lowtide("reschedule", kept.parent / "float", "--steps", 5, "--out", tmp_path / "no")
    assert_one_sentence(ended, "lowtide packed")
