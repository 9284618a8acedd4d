"""A recorded graph replayed equals the model's own forward pass, bit for bit, gradients too."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models import Adapter, adapt
from lowtide.models.trace import Graph, on_meta, record

every = pytest.mark.parametrize("name", tiny.MODELS)
both = pytest.mark.parametrize("leaves", ["layers", "blocks"])


def inputs_of(adapter: Adapter, model: nn.Module, seed: int, batch: int = 2) -> dict[str, Any]:
    torch.manual_seed(seed)
    inputs = adapter.architecture.example(model, batch)
    return inputs | {"timestep": inputs["timestep"] + seed}


def graph_of(adapter: Adapter, leaves: str, batch: int = 2) -> Graph:
    return adapter.block_graph(batch) if leaves == "blocks" else adapter.graph(batch, adapter.all_layers)


@every
@both
def test_replay_equals_forward(name: str, leaves: str) -> None:
    model = tiny.model(name)
    adapter = adapt(model)
    graph = graph_of(adapter, leaves)
    for seed in (0, 1):
        inputs = inputs_of(adapter, model, seed)
        with torch.no_grad():
            assert torch.equal(graph.replay(model, inputs)[0], model(**inputs)[0])


@every
def test_replay_equals_forward_with_gradients(name: str) -> None:
    model = tiny.model(name)
    adapter = adapt(model)
    inputs = inputs_of(adapter, model, 0)
    graph = graph_of(adapter, "layers")
    theirs = gradients(model, model(**inputs)[0])
    ours = gradients(model, graph.replay(model, inputs)[0])
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def gradients(model: nn.Module, answer: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    answer.square().mean().backward()
    return {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


@every
def test_replay_at_another_batch(name: str) -> None:
    model = tiny.model(name)
    adapter = adapt(model)
    inputs = inputs_of(adapter, model, 0, batch=3)
    with torch.no_grad():
        assert torch.equal(graph_of(adapter, "blocks", 3).replay(model, inputs)[0], model(**inputs)[0])


@every
def test_replay_of_a_half_precision_model(name: str) -> None:
    model = tiny.model(name).to(torch.bfloat16)
    adapter = adapt(model)
    inputs = inputs_of(adapter, model, 0)
    with torch.no_grad():
        assert torch.equal(graph_of(adapter, "layers").replay(model, inputs)[0], model(**inputs)[0])


@every
@both
def test_values_are_freed_once_and_after_their_last_use(name: str, leaves: str) -> None:
    graph = graph_of(adapt(tiny.model(name)), leaves)
    gone: set[int] = set()
    for node in graph.nodes:
        assert not gone & {*node.uses(), *node.gives()}
        assert not gone & set(node.frees)
        gone |= set(node.frees)
    kept = {id for node in graph.nodes for id in node.gives()} - gone
    assert len(kept) == 1


def test_a_leaf_is_called_by_name_and_may_be_swapped() -> None:
    model = tiny.model("unet2d")
    adapter = adapt(model)
    inputs = inputs_of(adapter, model, 0)
    graph = graph_of(adapter, "layers")
    before = graph.replay(model, inputs)[0]
    model.conv_out = nn.Sequential(model.conv_out, nn.Tanh())
    assert torch.equal(graph.replay(model, inputs)[0], before.tanh())


def test_a_part_runs_only_what_it_needs() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.left(sample) + self.right(timestep[:, None].expand(-1, 3))

    model = Two()
    inputs = {"sample": torch.randn(2, 3), "timestep": torch.randn(2)}
    meta = on_meta(model)
    graph = record(meta, {key: value.to("meta") for key, value in inputs.items()}, dict(meta.named_children()))
    (right,) = [node.gives()[0] for node in graph.nodes if node.target == "right"]
    part = graph.part([right])
    assert [node.target for node in part.nodes if node.is_leaf] == ["right"]
    assert list(part.inputs) == ["timestep"]
    (answer,) = part.replay(model, {"timestep": inputs["timestep"]})
    assert torch.equal(answer, model.right(inputs["timestep"][:, None].expand(-1, 3)))


class InPlace(nn.Module):
    """Writes into tensors: by method, by index, through a view."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = sample.clone()
        hidden[:, 0] = timestep
        hidden.mul_(2)
        hidden[:, 1:].add_(timestep[:, None])
        return self.layer(hidden)


def test_writes_in_place_are_replayed_and_dyed() -> None:
    model = InPlace()
    inputs = {"sample": torch.randn(2, 4), "timestep": torch.randn(2)}
    meta = on_meta(model)
    graph = record(meta, {key: value.to("meta") for key, value in inputs.items()}, {"layer": meta.layer})
    assert torch.equal(graph.replay(model, inputs), model(**inputs))
    (layer,) = [node for node in graph.nodes if node.is_leaf]
    assert graph.values[layer.uses()[0]].dye == {"sample", "timestep"}


class MadeElsewhere(nn.Module):
    """Takes a tensor that no torch function made while recording."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.hidden = [torch.ones(4, device="meta")]

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.layer(sample + self.hidden[0])


def test_a_tensor_made_elsewhere_is_refused() -> None:
    model = MadeElsewhere().to("meta")
    inputs = {"sample": torch.empty(2, 4, device="meta"), "timestep": torch.empty(2, device="meta")}
    with pytest.raises(BadInput, match="found a tensor made outside torch's functions"):
        record(model, inputs, {"layer": model.layer})
