"""Edges of recording: in-place writes, foreign tensors, swapped leaves, half precision."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from lowtide.errors import BadInput
from lowtide.models import Adapter, adapt
from lowtide.models.trace import on_meta, record

every = pytest.mark.parametrize("name", tiny.MODELS)


def inputs_of(adapter: Adapter, model: nn.Module) -> dict[str, Any]:
    torch.manual_seed(0)
    return adapter.architecture.example(model, 2)


@every
def test_replay_equals_forward_with_gradients(name: str) -> None:
    model = tiny.model(name)
    adapter = adapt(model)
    inputs = inputs_of(adapter, model)
    graph = adapter.layer_graph(2)
    theirs = gradients(model, model(**inputs)[0])
    ours = gradients(model, graph.replay(model, inputs)[0])
    assert ours.keys() == theirs.keys()
    assert len(ours) > 10
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def gradients(model: nn.Module, answer: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    answer.square().mean().backward()
    return {
        key: parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@every
def test_replay_of_a_half_precision_model(name: str) -> None:
    model = tiny.model(name).to(torch.bfloat16)
    adapter = adapt(model)
    inputs = inputs_of(adapter, model)
    with torch.no_grad():
        assert torch.equal(adapter.layer_graph(2).replay(model, inputs)[0], model(**inputs)[0])


def test_a_leaf_is_called_by_name_and_may_be_swapped() -> None:
    model = tiny.model("unet2d")
    adapter = adapt(model)
    inputs = inputs_of(adapter, model)
    graph = adapter.layer_graph(2)
    before = graph.replay(model, inputs)[0]
    model.conv_out = nn.Sequential(model.conv_out, nn.Tanh())
    assert torch.equal(graph.replay(model, inputs)[0], before.tanh())


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


def test_writes_in_place_are_replayed_with_their_inputs() -> None:
    model = InPlace()
    inputs = {"sample": torch.randn(2, 4), "timestep": torch.randn(2)}
    meta = on_meta(model)
    graph = record(
        meta, {key: value.to("meta") for key, value in inputs.items()}, {"layer": meta.layer}
    )
    assert torch.equal(graph.replay(model, inputs), model(**inputs))
    (layer,) = [node for node in graph.nodes if node.is_leaf]
    assert graph.values[layer.uses()[0]].inputs == {"sample", "timestep"}


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


def test_temporal_graphs_of_one_batch_share_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapt(tiny.model("dit"))
    recordings: list[tuple] = []
    graph = one.graph

    def counted(*arguments: Any) -> Any:
        recordings.append(arguments)
        return graph(*arguments)

    monkeypatch.setattr(one, "graph", counted)
    for unit in one.temporal():
        one.temporal_graph(unit, 3)
    assert (len(one.temporal()), len(recordings)) == (2, 1)
