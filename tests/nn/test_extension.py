"""Schedules that a packed model was not calibrated for: steps are added when they first run."""

import copy
import pickle
import warnings
from itertools import pairwise, product

import numpy as np
import pytest
import tiny
import tiny_pipelines
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from fused_networks import check_alike
from safetensors.torch import load_file

import lowtide
from lowtide import runtime, sampling
from lowtide.checkpoint import facts
from lowtide.errors import BadInput
from lowtide.formats import Affine
from lowtide.methods import relevant_options
from lowtide.models import adapt
from lowtide.nn import extension
from lowtide.nn.clock import Clock
from lowtide.nn.feature_cache import Cached
from lowtide.nn.plan import CachePlan, RequestPlan
from lowtide.nn.request_cache import request_caches
from lowtide.nn.request_features import PerRequest
from lowtide.nn.swap import find_clock
from lowtide.stages.temporal_features import TemporalFeatures

QUICK = {"weights": 8, "steps": 8, "images": 2, "calibration_steps": 2, "iters": 2, "batch": 2}
SAMPLERS = ("dpmsolver++", "unipc", "euler", "lcm")
STEPS = (5, 11)
METHODS = ("best", "tfmq", "temporal_cache", "tcaq")
WARNING = "input ranges are interpolated"


def floating():
    """A tiny model whose temporal features are as large as a trained model's."""
    model = tiny.model("unet2d")
    with torch.no_grad():
        for name, layer in model.named_modules():
            if name.endswith("time_emb_proj"):
                layer.weight.mul_(6)
    return DDIMPipeline(model, DDIMScheduler())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    home = tmp_path_factory.mktemp("packed")
    for method in METHODS:
        options = relevant_options(method, QUICK)
        lowtide.quantize(floating(), method=method, **options).save(home / method)
    return home


@pytest.fixture(scope="module")
def original():
    """The float model's images, by sampler and number of steps."""
    pipe = floating()
    drawn = {(name, n): images(pipe, n, name) for name, n in product(SAMPLERS, STEPS)}
    return drawn | {(None, 8): images(pipe, 8)}


def images(pipe, steps, sampler=None, seeds=(5, 6), **options):
    request = sampling.Request(steps=steps, seeds=seeds, scheduler=sampler, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{WARNING}")
        return sampling.images(pipe, request)


def call(model, timestep, seed=0):
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=f".*{WARNING}")
        return model(x, timestep)[0]


def difference(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


@pytest.mark.parametrize("method", METHODS)
def test_other_samplers_and_numbers_of_steps_run_at_once(folders, original, method):
    """They are about as near to the float model as the calibrated schedule is."""
    pipe = lowtide.load(folders / method)
    own = difference(images(pipe, 8), original[None, 8])
    assert not find_clock(pipe.unet).added
    for sampler in SAMPLERS:
        for steps in STEPS:
            error = difference(images(pipe, steps, sampler), original[sampler, steps])
            assert error < 2.5 * own


@pytest.mark.parametrize("method", ["tfmq", "tcaq"])
def test_input_ranges_lie_between_those_of_their_neighbours(folders, method):
    pipe = lowtide.load(folders / method)
    clock = find_clock(pipe.unet)
    call(pipe.unet, 700)
    call(pipe.unet, torch.tensor(999.0))
    assert clock.steps == 10
    above, below = clock.known[750], clock.known[625]
    share = (700 - 625) / (750 - 625)
    lows, highs = torch.stack([clock.scale[:, above], clock.scale[:, below]]).aminmax(dim=0)
    new = clock.scale[:, 8]
    assert (lows <= new).all() and (new <= highs).all()
    line = share * clock.scale[:, above] + (1 - share) * clock.scale[:, below]
    words = clock.zero[:, above] != clock.zero[:, below]
    assert torch.allclose(new[~words], line[~words], rtol=1e-5)
    lows, highs = torch.stack([clock.zero[:, above], clock.zero[:, below]]).aminmax(dim=0)
    assert (lows <= clock.zero[:, 8]).all() and (clock.zero[:, 8] <= highs).all()
    # Beyond the first calibrated timestep, its ranges count.
    assert torch.equal(clock.scale[:, 9], clock.scale[:, clock.known[875]])


@pytest.mark.parametrize("timestep", [700, 874.6, 3.25])
def test_features_are_of_exactly_this_timestep(folders, timestep):
    pipe = lowtide.load(folders / "temporal_cache")
    call(pipe.unet, torch.tensor(timestep))
    unit = adapt(floating().unet).temporal()[0]
    rows = [{"timestep": torch.tensor(float(t))} for t in (timestep, round(timestep) + 2)]
    features = TemporalFeatures(adapt(floating().unet), unit, rows)(floating().unet)
    for name, feature in zip(unit.features, features, strict=True):
        cached = pipe.unet.get_submodule(name)
        assert isinstance(cached, Cached)
        ours = cached.cached(torch.tensor(8))
        assert difference(ours.numpy(), feature[0].detach().numpy()) < 0.015
        assert difference(ours.numpy(), feature[1].detach().numpy()) > 0.02


def test_a_fraction_that_rounds_to_a_calibrated_key_has_a_step_of_its_own(folders):
    for method, steps in (("temporal_cache", 9), ("tfmq", 8)):
        model = lowtide.load(folders / method).unet
        call(model, torch.tensor(875.0))
        call(model, torch.tensor(874.6))
        assert find_clock(model).steps == steps


@pytest.mark.parametrize("method", ["best", "tfmq"])
def test_fused_equals_layer_by_layer_at_new_timesteps(folders, method):
    pipe = lowtide.load(folders / method)
    images(pipe, 3, "euler")
    times = [999.0, 499.5, 0.0]
    ours = [call(pipe.unet, torch.tensor(time)) for time in times]
    assert runtime.is_fused(pipe.unet)
    with lowtide.unfused(pipe):
        plain = [call(pipe.unet, torch.tensor(time)) for time in times]
    check_alike(ours, plain, 2e-6)


@pytest.mark.parametrize("method", ["best", "tfmq"])
def test_what_is_saved_is_what_was_loaded(folders, method, tmp_path):
    pipe = lowtide.load(folders / method)
    own = images(pipe, 8)
    drawn = images(pipe, 5)
    assert find_clock(pipe.unet).added
    weights = "unet/diffusion_pytorch_model.safetensors"
    before = load_file(folders / method / weights)
    after = load_file(lowtide.save(pipe, tmp_path / "again") / weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    again = lowtide.load(tmp_path / "again")
    assert np.array_equal(images(again, 5), drawn)
    assert np.array_equal(images(again, 8), own) and np.array_equal(images(pipe, 8), own)


def test_a_schedule_is_added_whole_and_said_once(folders):
    """So a program is prepared once for a schedule, and not at every step."""
    pipe = lowtide.load(folders / "best")
    fused = vars(pipe.unet)["forward"]
    states = []
    pipe.unet.register_forward_hook(lambda *_: states.append(fused.state))
    request = sampling.Request(steps=5, seeds=(5,))
    with pytest.warns(UserWarning, match=WARNING) as told:
        sampling.images(pipe, request)
        sampling.images(pipe, sampling.Request(steps=6, seeds=(5,)))
    assert [WARNING in str(each.message) for each in told] == [True]
    assert len({id(state) for state in states[:5]}) == 1 and len(states) == 11


def test_without_a_schedule_to_see_steps_are_added_one_by_one(folders):
    """In inference mode, a timestep does not say which schedule it is part of."""
    one_by_one = lowtide.load(folders / "best")
    whole = lowtide.load(folders / "best")
    with torch.inference_mode():
        drawn = images(one_by_one, 5)
    images(whole, 5)
    assert find_clock(one_by_one.unet).added.keys() == find_clock(whole.unet).added.keys()
    assert np.array_equal(images(one_by_one, 5), drawn)
    names = {table.name for table in extension.step_tables(whole.unet)}
    ours, theirs = dict(one_by_one.unet.named_buffers()), dict(whole.unet.named_buffers())
    for name in names:
        if ours[name].is_floating_point():
            assert torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6), name


def test_a_model_of_one_schedule_refuses_another_in_one_sentence(folders, tmp_path):
    options = QUICK | {"only_schedule": True}
    result = lowtide.quantize(floating(), method="best", **options)
    way_out = r"found timestep 800; expected one of the 8 .*quantize again without --only-schedule"
    with pytest.raises(BadInput, match=way_out):
        images(result.pipe, 5)
    packed = result.save(tmp_path / "only")
    with pytest.raises(BadInput, match=way_out):
        images(lowtide.load(packed), 5)
    assert facts.on_disk(packed) < facts.on_disk(folders / "best")


def test_a_label_is_answered_by_request_on_a_new_schedule(tmp_path):
    options = tiny_pipelines.request_fields("dit")
    pipe = tiny_pipelines.dit(tmp_path)
    quick = QUICK | {"steps": 3, "weights": 4}
    result = lowtide.quantize(pipe, method="temporal_cache", **quick, **options)
    folder = result.save(tmp_path / "packed")
    own = images(result.pipe, 3, **options)
    drawn = images(result.pipe, 4, **options)
    [cache] = request_caches(result.model)
    assert len(cache.steps) == 3 + 4 - 1
    computed = lowtide.load(folder)
    images(computed, 4, **options)
    [other] = request_caches(computed.transformer)
    other.set_plan(other.plan)  # every new timestep is computed at its call
    assert difference(images(computed, 4, **options), drawn) < 2e-3
    assert np.array_equal(images(result.pipe, 3, **options), own)
    assert np.array_equal(images(lowtide.load(folder), 3, **options), own)


def test_a_new_step_takes_the_layer_that_the_nearest_step_takes():
    cache = CachePlan(2, Affine(8, axis=0), computed=True)
    plan = RequestPlan(("timestep",), cache)
    layer = PerRequest("layer", torch.nn.Linear(2, 2), plan, Clock((3, 2, 1), keyed=True))
    layer.chosen = torch.tensor([True, False, True])
    layer.add(torch.tensor([1, 0]))
    assert layer.chosen.tolist() == [True, False, True, False, True]


def test_a_recorded_call_finds_what_an_earlier_call_added(folders):
    model = lowtide.load(folders / "best").unet
    clock = find_clock(model)
    clock._set_on_device(torch.tensor(700.0), 0.5)
    assert clock.doubt.isnan()
    call(model, 700)
    clock._set_on_device(torch.tensor(700.0), 0.5)
    assert clock.doubt == 0 and clock.index == 8


def test_a_half_precision_timestep_takes_an_added_step_near_it(folders):
    model = lowtide.load(folders / "best").unet
    call(model, 701)
    call(model, torch.tensor(701).bfloat16())
    clock = find_clock(model)
    assert torch.tensor(701).bfloat16() == 700
    assert clock.steps == 9 and clock.index == 8


def test_earlier_schedules_are_forgotten_when_there_are_too_many_steps(folders, monkeypatch):
    pipe = lowtide.load(folders / "best")
    own = images(pipe, 8)
    first = images(pipe, 5)
    monkeypatch.setattr(extension, "MOST", 8)
    images(pipe, 7)
    added = find_clock(pipe.unet).added
    assert len(added) == 6 and 800.0 not in added  # 0 is calibrated
    assert np.array_equal(images(pipe, 5), first) and np.array_equal(images(pipe, 8), own)


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_goes_on(folders, kind):
    model = lowtide.load(folders / "best", fused=False).unet
    call(model, 700)
    copied = copy.deepcopy(model) if kind == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(call(copied, 700), call(model, 700))
    assert torch.equal(call(copied, 300), call(model, 300))
    clock = find_clock(copied)
    assert clock is not find_clock(model) and clock.steps == 10
    assert all(part.clock is clock for part in copied.modules() if isinstance(part, Cached))


def test_outside_the_calibrated_timesteps_the_outermost_counts():
    near = extension.Neighbours.of([900.0, 500.0, 100.0], [950.0, 900.0, 600.0, 100.0, 0.0])
    assert near.between(torch.tensor([9.0, 5.0, 1.0])).tolist() == [9.0, 9.0, 6.0, 1.0, 1.0]
    assert near.nearest.tolist() == [0, 0, 1, 2, 2]
    assert all(a >= b for a, b in pairwise(near.between(torch.tensor([3.0, 2.0, 1.0])).tolist()))


def test_an_exported_graph_knows_the_steps_that_were_added(folders):
    model = lowtide.load(folders / "best").unet
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = [call(model, torch.tensor(time)) for time in (875, 700)]
    with torch.no_grad():
        graph = torch.export.export(model, (x, torch.tensor(875)), strict=False).module()
        answers = [graph(x, torch.tensor(time))[0] for time in (875, 700)]
        assert graph(x, torch.tensor(600))[0].isnan().all()
    check_alike(answers, expected, 2e-6)


def test_flow_matching_takes_other_numbers_of_steps(tmp_path):
    """Flux divides its timesteps by 1000, so a call does not show the schedule."""
    options = tiny_pipelines.request_fields("flux")
    pipe = tiny_pipelines.PIPELINES["flux"](tmp_path)
    original = images(pipe, 5, **options)
    result = lowtide.quantize(pipe, method="tfmq", **QUICK | {"steps": 3}, **options)
    own = images(result.pipe, 3, **options)
    drawn = images(result.pipe, 5, **options)
    clock = find_clock(result.model)
    times = sampling.recording.timesteps(result.pipe, sampling.Request(steps=5, **options))
    assert clock.steps == len(clock.known | dict.fromkeys(round(1000 * time) for time in times))
    assert difference(drawn, original) < 0.2
    lowtide.reschedule(result, 5)
    assert difference(images(result.pipe, 5, **options), drawn) < 1e-3
    assert not np.array_equal(own, drawn)
