"""Weights in memory: once, in their bits, and back in the order of the checkpoint when asked."""

import copy
import gc

import pytest
import tiny_pipelines
import torch
from fused_networks import needs_library

import lowtide
from lowtide import runtime
from lowtide.methods import relevant_options
from lowtide.nn.swap import packed_layers
from lowtide.runtime.float_twin import record_twin
from lowtide.runtime.prepared import uncollected

QUICK = {"steps": 2, "images": 1, "calibration_steps": 1}

pytestmark = needs_library


WEIGHTS = [{"weights": 2}, {"weights": 4}, {"weights": 8}, {"weights": 4, "group": 16}]


@pytest.fixture(scope="module", params=WEIGHTS, ids=str)
def model(request, tmp_path_factory):
    """A packed denoiser that has run once."""
    pipe = tiny_pipelines.ddim(tmp_path_factory.mktemp("ddim"))
    options = relevant_options("minmax", QUICK | request.param)
    packed = lowtide.quantize(pipe, method="minmax", **options).model
    run(packed)
    return packed


@torch.no_grad()
def run(model) -> torch.Tensor:
    torch.manual_seed(0)
    timestep = int(model.lowtide_clock.timesteps[0])
    return model(torch.randn(1, 3, 8, 8), timestep).sample


def held(model) -> dict[str, torch.nn.Module]:
    return {name: layer for name, layer in packed_layers(model) if layer.panels is not None}


def test_weights_are_in_memory_once_and_in_their_bits(model):
    layers = held(model)
    assert len(layers) > 40
    for layer in layers.values():
        assert layer.weight.data_ptr() == layer.panels.data.data_ptr()
    large = [layer for layer in layers.values() if layer.channels % 32 == 0]
    taken = sum(layer.weight.nbytes for layer in large)
    bits = [layer.format.bits * layer.channels * layer.taps for layer in large]
    rows = [layer.panels.columns for layer in large]
    needed = sum(each * count for each, count in zip(bits, rows, strict=True)) / 8
    assert large
    assert taken <= 1.1 * needed


def test_the_state_is_that_of_the_checkpoint(model):
    before = copy.deepcopy(model)
    for layer in held(before).values():
        layer.hold_codes()
    assert not held(before)
    found = model.state_dict()
    expected = before.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_another_type_or_device_takes_the_order_of_the_checkpoint(model):
    moved = copy.deepcopy(model)
    for _, layer in packed_layers(moved):
        layer.hold_panels()  # a copy has the order of the checkpoint
    assert moved.to("cpu") is moved
    assert held(moved)
    moved.to("meta")
    assert not held(moved)
    shapes = {name: layer.codes().shape for name, layer in packed_layers(model)}
    assert {name: layer.weight.shape for name, layer in packed_layers(moved)} == shapes


def test_layer_by_layer_on_held_panels_is_the_same(model):
    with lowtide.unfused(model):
        expected = run(model)
    twin = copy.deepcopy(model)
    for layer in held(twin).values():
        layer.hold_codes()
    runtime.unfuse(twin)
    assert torch.equal(run(twin), expected)


def test_a_state_is_loaded_into_held_panels(model):
    twin = copy.deepcopy(model)
    state = model.state_dict()
    name = "mid_block.resnets.0.conv1.weight"
    twin.load_state_dict(state | {name: state[name].flip(0)})
    assert torch.equal(twin.state_dict()[name], state[name].flip(0))
    assert not torch.equal(run(twin), run(model))


def test_a_float_twin_copies_no_weight(model):
    """Its packed layers stand for nothing but shapes, and those of the model stay as they are."""
    before = {name: (layer, layer.weight, layer.panels) for name, layer in held(model).items()}
    timestep = model.lowtide_clock.timesteps[0]
    inputs = {"sample": torch.randn(1, 3, 8, 8), "timestep": timestep}
    graph = record_twin(model, inputs)
    assert {name for name, _ in graph.leaf_nodes()} >= before.keys()
    for name, layer in held(model).items():
        found = (layer, layer.weight, layer.panels)
        assert all(now is then for now, then in zip(found, before[name], strict=True))
        assert not layer.weight.is_meta


def test_uncollected_holds_collections_back():
    """And leaves them as they were, also after an error."""
    seen: list[bool] = []
    threshold = gc.get_threshold()
    gc.callbacks.append(lambda phase, info: seen.append(gc.isenabled()))
    gc.set_threshold(1)
    try:
        with uncollected():
            seen.clear()
            made = [[each] for each in range(1000)]
            assert not seen
        made += [[each] for each in range(1000)]
        assert all(seen) and seen
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()
