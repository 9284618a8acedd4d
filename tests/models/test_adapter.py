"""The adapter agrees with real forward passes: their order, and the inputs that change a layer."""

from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lowtide.models import Adapter, adapt
from lowtide.models.named_inputs import flat_inputs
from lowtide.models.trace import mapped

every = pytest.mark.parametrize("name", tiny.MODELS)
TIMES = (3, 250, 999)


@cache
def subject(name: str) -> tuple[nn.Module, Adapter]:
    model = tiny.model(name)
    return model, adapt(model)


def example(name: str) -> dict[str, Any]:
    model, adapter = subject(name)
    torch.manual_seed(5)
    return adapter.architecture.example(model, 1)


@torch.no_grad()
def inputs_of_layers(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """The inputs of each layer, in the order of first calls."""
    by_layer: dict[str, list[Tensor]] = {}

    def recording(name: str) -> Callable:
        return lambda _, args: by_layer.setdefault(name, []).append(args[0])

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            hooks.append(module.register_forward_pre_hook(recording(name)))
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return by_layer


def changed(inputs: dict[str, Any], path: str) -> dict[str, Any]:
    """The same inputs with one of them different."""
    name, _, rest = path.partition(".")
    value = changed(inputs[name], rest) if rest else other(inputs[name])
    return inputs | {name: value}


def other(value: Tensor) -> Tensor:
    return value + 1 if value.dtype == torch.int64 else value + torch.randn_like(value)


def moved(before: list[Tensor], after: list[Tensor]) -> bool:
    return any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))


@every
def test_layers_are_in_forward_order(name: str) -> None:
    model, adapter = subject(name)
    assert list(adapter.layers()) == list(inputs_of_layers(model, example(name)))


@every
def test_reads_are_the_inputs_that_change_the_input_of_a_layer(name: str) -> None:
    model, adapter = subject(name)
    inputs = example(name)
    before = inputs_of_layers(model, inputs)
    expected: dict[str, set[str]] = {layer: set() for layer in adapter.layers()}
    for path in flat_inputs(inputs):
        after = inputs_of_layers(model, changed(inputs, path))
        for layer in expected:
            expected[layer] |= {path} if moved(before[layer], after[layer]) else set()
    assert {layer: set(names) for layer, names in adapter.reads.items()} == expected


@every
def test_units_partition_the_layers(name: str) -> None:
    model, adapter = subject(name)
    listed = list(chain.from_iterable(unit.layers for unit in adapter.units()))
    everything = [
        key for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    assert sorted([*listed, *adapter.uncalled()]) == sorted(everything)


def at_time(name: str, inputs: dict[str, Any], time: int) -> dict[str, Any]:
    dtype = inputs["timestep"].dtype
    return inputs | {"timestep": torch.tensor([time / subject(name)[1].ticks], dtype=dtype)}


@torch.no_grad()
def outputs_of(model: nn.Module, names: list[str], inputs: dict[str, Any]) -> list[Tensor]:
    """The outputs of these layers within a whole forward pass."""
    outputs: dict[str, Tensor] = {}

    def recording(name: str) -> Callable:
        return lambda _, args, result: outputs.update({name: result})

    hooks = [model.get_submodule(name).register_forward_hook(recording(name)) for name in names]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    return [outputs[name] for name in names]


@every
def test_temporal_graph_gives_the_features_of_all_timesteps_at_once(name: str) -> None:
    model, adapter = subject(name)
    inputs = example(name)
    for unit in adapter.temporal():
        flat = flat_inputs(inputs)
        rows = {path: flat[path].expand(len(TIMES), *flat[path].shape[1:]) for path in unit.reads}
        rows["timestep"] = torch.cat([at_time(name, inputs, time)["timestep"] for time in TIMES])
        with torch.no_grad():
            together = adapter.temporal_graph(unit, len(TIMES)).replay(model, rows)
        features = list(unit.features)
        singly = [outputs_of(model, features, at_time(name, inputs, time)) for time in TIMES]
        for ours, theirs in zip(together, zip(*singly, strict=True), strict=True):
            target = torch.cat(theirs)
            assert (ours - target).norm() / target.norm() < 1e-5


@every
def test_features_carry_all_that_the_content_knows_of_time(name: str) -> None:
    model, adapter = subject(name)
    early = at_time(name, example(name), 10)
    late = at_time(name, example(name), 900)
    features = list(chain.from_iterable(unit.features for unit in adapter.temporal()))
    late_outputs = dict(zip(features, outputs_of(model, features, late), strict=True))

    def replacing(feature: str) -> Callable:
        return lambda *_: late_outputs[feature]

    hooks = [
        model.get_submodule(feature).register_forward_hook(replacing(feature))
        for feature in features
    ]
    with torch.no_grad():
        spoofed = model(**early)[0]
        for hook in hooks:
            hook.remove()
        assert torch.equal(spoofed, model(**late)[0])
        assert not torch.equal(spoofed, model(**early)[0])


def test_calls_are_bound_by_name() -> None:
    _, adapter = subject("unet-text")
    bound = adapter.bind((1, 2), {"encoder_hidden_states": 3})
    assert bound == {"sample": 1, "timestep": 2, "encoder_hidden_states": 3}
    assert subject("dit")[1].bind((1,), {"timestep": 2}) == {"hidden_states": 1, "timestep": 2}


def test_a_layer_that_is_never_called_is_named() -> None:
    model = tiny.model("unet2d")
    model.spare = nn.Linear(2, 2)
    adapter = adapt(model)
    assert adapter.uncalled() == ["spare"]
    assert "spare" not in adapter.layers()


def test_a_shared_layer_is_named_once() -> None:
    model = tiny.model("unet2d")
    resnets = model.down_blocks[0].resnets, model.up_blocks[1].resnets
    resnets[1][0].time_emb_proj = resnets[0][0].time_emb_proj
    listed = list(chain.from_iterable(unit.layers for unit in adapt(model).units()))
    assert listed.count("down_blocks.0.resnets.0.time_emb_proj") == 1
    assert "up_blocks.1.resnets.0.time_emb_proj" not in listed


@every
def test_adapting_leaves_the_model_as_it_was(name: str) -> None:
    model = tiny.model(name).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapt(model).block_graph(2)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_example_gives_the_real_shapes() -> None:
    model, _ = subject("unet-text")
    inputs = {
        "sample": torch.zeros(1, 4, 16, 8),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 5, 32),
    }
    graph = adapt(model, inputs).block_graph(3)
    shapes = mapped(graph.inputs, lambda id: graph.values[id].shape)
    assert shapes == {
        "sample": (3, 4, 16, 8),
        "timestep": (3,),
        "encoder_hidden_states": (3, 5, 32),
    }
