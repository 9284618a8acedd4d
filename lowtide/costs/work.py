"""The work of one pass through a network, from its recorded graph: multiply-adds, values, calls."""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.models import Adapter, Unit
from lowtide.models.trace import Graph, Node

FLOAT = 4  # bytes of a float32 value
# Calls whose result shares the memory of their input.
VIEWS = {
    Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.permute, Tensor.unsqueeze,
    Tensor.squeeze, Tensor.expand, Tensor.__getitem__, Tensor.chunk, Tensor.split,
    Tensor.flatten, Tensor.unflatten, Tensor.to, Tensor.float, Tensor.unbind,
    torch.chunk, torch.split, torch.reshape, torch.transpose, torch.flatten,
    torch.unsqueeze, torch.squeeze, torch.unbind, F.dropout,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """An amount of work.

    conv: multiply-adds of convolutions.
    product: multiply-adds of other matrix products.
    values: values that all other calls write.
    weights: weights whose rounding is learnt.
    calls: calls of torch functions and layers.
    """

    conv: float = 0
    product: float = 0
    values: float = 0
    weights: float = 0
    calls: float = 0

    def __add__(self, other: "Work") -> "Work":
        names = [each.name for each in fields(self)]
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def of(self, samples: float) -> "Work":
        """One pass over `samples` samples, if this is a pass over one.

        The numbers of weights and calls do not depend on the number of samples.
        """
        return Work(
            conv=samples * self.conv,
            product=samples * self.product,
            values=samples * self.values,
            weights=self.weights,
            calls=self.calls,
        )


@dataclass(frozen=True)
class Part:
    """A unit, or the whole network. All numbers are for one sample.

    forward: the work of a forward pass.
    reads: values that the layers read.
    kept: values kept for a backward pass.
    scores: values of attention's softmax.
    weights: weights of all layers; `largest`: of the largest layer.
    layers: the number of layers.
    """

    forward: Work
    reads: float = 0
    kept: float = 0
    scores: float = 0
    weights: float = 0
    largest: float = 0
    layers: int = 0


class Network:
    """The work of a denoiser for one sample, as a whole and by unit.

    The graph is recorded with a batch of two, so numbers of values are halved.
    """

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.graph = adapter.layer_graph(2)
        self.units = [unit for unit in adapter.units() if unit.kind != "temporal"]
        self.temporal = adapter.temporal()

    @cached_property
    def whole(self) -> Part:
        """Every node of a forward pass."""
        return self._part(list(self.graph.nodes), list(self.adapter.layers()))

    @cached_property
    def by_unit(self) -> dict[str, Part]:
        """The part of each unit.

        A call between layers belongs to the unit whose layer ran last; before the first layer, to
        the first unit.
        """
        unit_of = {}
        for unit in self.units:
            unit_of |= dict.fromkeys(unit.layers, unit.name)
        nodes: dict[str, list[Node]] = {unit.name: [] for unit in self.units}
        current = self.units[0].name
        for node in self.graph.nodes:
            if isinstance(node.target, str):
                current = unit_of.get(node.target, current)
            if not node.is_leaf or node.target in unit_of:
                nodes[current].append(node)
        return {unit.name: self._part(nodes[unit.name], list(unit.layers)) for unit in self.units}

    def temporal_part(self, unit: Unit) -> Part:
        """From the inputs of a temporal unit to its features, for one row."""
        nodes = self.adapter.temporal_graph(unit, 2).nodes
        return self._part(list(nodes), list(unit.layers))

    def _part(self, nodes: list[Node], layers: list[str]) -> Part:
        works = [self.node_work(node) for node in nodes]
        sizes = [layer_weight(self.adapter.all_layers[name]).numel() for name in layers]
        leaves = [node for node in nodes if node.is_leaf]
        computed = [node for node in nodes if node.target not in VIEWS]
        return Part(
            forward=sum(works, Work()),
            reads=sum(self._count(node.uses()[0]) for node in leaves),
            kept=sum(self._written(node) for node in computed),
            scores=sum(self._scores(node) for node in nodes),
            weights=sum(sizes),
            largest=max(sizes, default=0),
            layers=len(layers),
        )

    def node_work(self, node: Node) -> Work:
        """One call, for one sample."""
        written = self._written(node)
        if node.is_leaf:
            layer = self.layer(node)
            products = written * math.prod(layer_weight(layer).shape[1:])
            if isinstance(layer, nn.Conv2d):
                return Work(conv=products, calls=1)
            return Work(product=products, calls=1)
        if node.target is F.scaled_dot_product_attention:
            scores = self._scores(node)
            query_width = self.shape(node.uses()[0])[-1]
            return Work(product=scores * 2 * query_width, values=scores, calls=1)
        return Work(values=0 if node.target in VIEWS else written, calls=1)

    def layer(self, node: Node) -> nn.Module:
        """The layer that a leaf node calls, on the meta device."""
        assert isinstance(node.target, str)
        return self.adapter.all_layers[node.target]

    def shape(self, id: int) -> tuple[int, ...]:
        """The shape of a value, with a batch of two."""
        return self.graph.values[id].shape

    def _scores(self, node: Node) -> float:
        """Values of an attention's softmax, for one sample."""
        if node.target is not F.scaled_dot_product_attention:
            return 0
        query, key = (self.shape(id) for id in node.uses()[:2])
        return math.prod(query[:-1]) * key[-2] / 2

    def _written(self, node: Node) -> float:
        """Values that a call gives, for one sample."""
        return sum(self._count(id) for id in node.gives())

    def _count(self, id: int) -> float:
        return math.prod(self.shape(id)) / 2

    @cached_property
    def alive(self) -> float:
        """The most values alive at one moment of a forward pass, for one sample."""
        return _most_alive(self.graph) / 2

    @cached_property
    def largest_scores(self) -> float:
        """Values of the largest softmax, for one sample."""
        return max((self._scores(node) for node in self.graph.nodes), default=0)

    @cached_property
    def streamed(self) -> float:
        """The most values alive between units, for one sample: what a tape holds of one stream."""
        return _most_alive(self.adapter.block_graph(2)) / 2


def layer_weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer or a convolution."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _most_alive(graph: Graph) -> float:
    """The most values alive at one moment. Each is freed after its last use; a view has none."""
    held = {id: math.prod(graph.values[id].shape) for id in graph.inputs.values()}
    most = sum(held.values())
    for node in graph.nodes:
        size = 0 if node.target in VIEWS else 1
        held |= {id: size * math.prod(graph.values[id].shape) for id in node.gives()}
        most = max(most, sum(held.values()))
        for id in node.frees:
            held.pop(id, None)
    return most
