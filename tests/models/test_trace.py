"""Replaying a recorded graph is the model itself: same bits, any part, with gradients."""

from itertools import chain

import pytest
import tiny
import torch

from lowtide.errors import BadInput
from lowtide.models import adapt
from lowtide.models.named_inputs import flat_inputs
from lowtide.models.trace import on_meta, record


@pytest.fixture(scope="module", params=tiny.MODELS)
def case(request):
    model = tiny.model(request.param)
    return model, adapt(model)


@pytest.mark.parametrize("leaves", ["blocks", "layers"])
def test_replay_is_the_forward_pass_bit_for_bit(case, leaves):
    model, adapter = case
    graph = adapter.block_graph(3) if leaves == "blocks" else adapter.graph(3, adapter.all_layers)
    for seed in range(2):
        torch.manual_seed(seed)
        inputs = adapter.architecture.example(model, 3)
        with torch.no_grad():
            assert torch.equal(graph.replay(model, inputs)[0], model(**inputs)[0])


def test_the_temporal_part_alone_gives_what_its_layers_give(case):
    model, adapter = case
    inputs = adapter.architecture.example(model, 3)
    for unit in adapter.temporal():
        outputs: dict[str, torch.Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(recording(outputs, name))
            for name in unit.features
        ]
        with torch.no_grad():
            model(**inputs)
            graph = adapter.temporal_graph(unit, 3)
            assert set(graph.inputs) == set(unit.reads)
            tensors = flat_inputs(inputs)
            features = graph.replay(model, {name: tensors[name] for name in unit.reads})
        for hook in hooks:
            hook.remove()
        assert len(features) == len(unit.features) > 0
        for name, value in zip(unit.features, features, strict=True):
            assert torch.equal(value, outputs[name].reshape(value.shape)), name


def recording(outputs: dict[str, torch.Tensor], name: str):
    return lambda module, args, output: outputs.update({name: output})


def test_gradients_flow_through_a_replay():
    model = tiny.model("unet2d")
    adapter = adapt(model)
    (unit,) = adapter.temporal()
    features = adapter.temporal_graph(unit, 5).replay(model, {"timestep": torch.arange(5)})
    sum(feature.square().sum() for feature in features).backward()
    assert model.time_embedding.linear_1.weight.grad.abs().sum() > 0
    assert model.conv_in.weight.grad is None


def test_many_timesteps_at_once_equal_one_by_one():
    model = tiny.model("unet2d")
    adapter = adapt(model)
    (unit,) = adapter.temporal()
    many_times = {"timestep": torch.arange(5) * 200}
    one_time = {"timestep": torch.tensor([600])}
    with torch.no_grad():
        together = adapter.temporal_graph(unit, 5).replay(model, many_times)
        alone = adapter.temporal_graph(unit, 1).replay(model, one_time)
    for many, one in zip(together, alone, strict=True):
        assert (many[3] - one[0]).norm() / one.norm() < 1e-6


def test_values_are_freed_after_their_last_use(case):
    _, adapter = case
    graph = adapter.block_graph(3)
    freed = list(chain.from_iterable(node.frees for node in graph.nodes))
    assert len(freed) == len(set(freed))
    used_after: dict[int, int] = {}
    for place, node in enumerate(graph.nodes):
        used_after |= dict.fromkeys(node.uses(), place)
    for place, node in enumerate(graph.nodes):
        assert all(used_after.get(id, place) <= place for id in node.frees)


def test_recording_touches_no_data():
    model = tiny.model("unet2d")
    meta = on_meta(model)
    assert all(parameter.is_meta for parameter in meta.parameters())
    inputs = {
        "sample": torch.randn(2, 3, 8, 8, device="meta"),
        "timestep": torch.arange(2, device="meta"),
    }
    graph = record(meta, inputs, {})
    assert all(value.shape is not None for value in graph.values.values())
    assert not next(model.parameters()).is_meta


def test_a_model_nobody_described_says_what_to_do():
    words = r"found Linear; expected one of UNet2DModel, .* write an Architecture"
    with pytest.raises(BadInput, match=words):
        adapt(torch.nn.Linear(2, 2))


def test_an_example_without_a_timestep_is_refused():
    with pytest.raises(BadInput, match="inputs x; expected a denoiser called"):
        adapt(torch.nn.Linear(2, 2), {"x": torch.zeros(1, 2)})
