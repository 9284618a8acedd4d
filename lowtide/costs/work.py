"""Work: what one pass through a network costs, from its recorded graph: multiply-adds, values written, calls, bytes alive."""

import math
from dataclasses import dataclass, fields
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowtide.models import Adapter, Unit
from lowtide.models.trace import Graph, Node

FLOAT = 4
# Calls that answer with the memory they were given.
VIEWS = {
    Tensor.view, Tensor.reshape, Tensor.transpose, Tensor.permute, Tensor.unsqueeze, Tensor.squeeze, Tensor.expand,
    Tensor.__getitem__, Tensor.chunk, Tensor.split, Tensor.flatten, Tensor.unflatten, Tensor.to, Tensor.float, Tensor.unbind,
    torch.chunk, torch.split, torch.reshape, torch.transpose, torch.flatten, torch.unsqueeze, torch.squeeze, torch.unbind,
    F.dropout,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """Multiply-adds of convolutions and of matrix products, values written by everything else, weights learnt, calls."""

    conv: float = 0
    product: float = 0
    values: float = 0
    weights: float = 0
    calls: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            *(getattr(self, each.name) + getattr(other, each.name) for each in fields(self))
        )

    def times(self, count: float) -> "Work":
        """All of it so many times."""
        return Work(*(count * getattr(self, each.name) for each in fields(self)))

    def of(self, samples: float) -> "Work":
        """One pass over so many samples, if this is a pass over one: calls stay what they are."""
        return Work(
            samples * self.conv,
            samples * self.product,
            samples * self.values,
            self.weights,
            self.calls,
        )


@dataclass(frozen=True)
class Part:
    """A unit, or the whole network: its work for one sample, and values: read, kept for a backward pass, in scores, weights."""

    forward: Work
    reads: float = 0
    kept: float = 0
    scores: float = 0
    weights: float = 0
    largest: float = 0
    layers: int = 0


class Network:
    """The work of a denoiser, per sample, as a whole and by unit."""

    def __init__(self, adapter: Adapter):
        self.adapter, self.graph = adapter, adapter.layer_graph(2)
        self.units = [unit for unit in adapter.units() if unit.kind != "temporal"]
        self.temporal = adapter.temporal()

    @cached_property
    def whole(self) -> Part:
        """Every node of a forward pass."""
        return self.part(list(self.graph.nodes), list(self.adapter.layers()))

    @cached_property
    def by_unit(self) -> dict[str, Part]:
        """Calls between layers belong to the unit whose layer ran last; those before the first belong to the first."""
        homes = {name: unit.name for unit in self.units for name in unit.layers}
        nodes: dict[str, list[Node]] = {unit.name: [] for unit in self.units}
        current = self.units[0].name
        for node in self.graph.nodes:
            current = homes.get(node.target, current) if node.is_leaf else current
            if not node.is_leaf or node.target in homes:
                nodes[current].append(node)
        return {unit.name: self.part(nodes[unit.name], list(unit.layers)) for unit in self.units}

    def temporal_part(self, unit: Unit) -> Part:
        """From what a temporal unit reads to its features, for one row."""
        nodes = self.adapter.temporal_graph(unit, 2).nodes
        return self.part(list(nodes), list(unit.layers))

    def part(self, nodes: list[Node], layers: list[str]) -> Part:
        works = [self.node_work(node) for node in nodes]
        sizes = [self.adapter.all_layers[name].weight.numel() for name in layers]
        leaves = [node for node in nodes if node.is_leaf]
        return Part(
            forward=sum(works, Work()),
            reads=sum(self.count(node.uses()[0]) for node in leaves),
            kept=sum(
                self.count(id) for node in nodes if node.target not in VIEWS for id in node.gives()
            ),
            scores=sum(self.scores(node) for node in nodes),
            weights=sum(sizes),
            largest=max(sizes, default=0),
            layers=len(layers),
        )

    def node_work(self, node: Node) -> Work:
        """One call, per sample."""
        written = sum(self.count(id) for id in node.gives())
        if node.is_leaf:
            layer = self.adapter.all_layers[node.target]
            products = written * math.prod(layer.weight.shape[1:])
            return (
                Work(conv=products, calls=1)
                if isinstance(layer, nn.Conv2d)
                else Work(product=products, calls=1)
            )
        if node.target is F.scaled_dot_product_attention:
            return Work(
                product=self.scores(node) * 2 * self.shape(node.uses()[0])[-1],
                values=self.scores(node),
                calls=1,
            )
        return Work(values=0 if node.target in VIEWS else written, calls=1)

    def scores(self, node: Node) -> float:
        """Values of an attention's softmax, per sample."""
        if node.target is not F.scaled_dot_product_attention:
            return 0
        query, key = (self.shape(id) for id in node.uses()[:2])
        return math.prod(query[:-1]) * key[-2] / 2

    def shape(self, id: int) -> tuple[int, ...]:
        return self.graph.values[id].shape

    def count(self, id: int) -> float:
        """Values per sample."""
        return math.prod(self.shape(id)) / 2

    @cached_property
    def alive(self) -> float:
        """The most values that are alive at one moment of a forward pass, per sample."""
        return most_alive(self.graph) / 2

    @cached_property
    def largest_scores(self) -> float:
        """Values of the largest softmax, per sample."""
        return max((self.scores(node) for node in self.graph.nodes), default=0)

    @cached_property
    def streamed(self) -> float:
        """The most values alive between units, per sample: what a tape holds of one stream."""
        return most_alive(self.adapter.block_graph(2)) / 2


def most_alive(graph: Graph) -> float:
    """Walk the graph and forget each value after its last use; a view takes nothing."""
    held = {id: math.prod(graph.values[id].shape) for id in graph.inputs.values()}
    most = sum(held.values())
    for node in graph.nodes:
        size = 0 if node.target in VIEWS else 1
        held |= {id: size * math.prod(graph.values[id].shape) for id in node.gives()}
        most = max(most, sum(held.values()))
        for id in node.frees:
            held.pop(id, None)
    return most
