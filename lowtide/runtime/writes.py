"""Calls that write in place: which of them a program follows.

A program lays out values in an order of its own, so a reshape that is a view in the forward pass
may be a copy here, or the other way round. A write is followed where that makes no difference: the
values that share memory with the written one, and are read later, are the same in both.
"""

from collections.abc import Mapping

from lowtide.models.trace import Graph, Node, Ref
from lowtide.runtime.memory import View
from lowtide.runtime.torch_calls import name_of


class Unfollowed(Exception):
    """The forward pass cannot run as a program. The message says why."""


class Writes:
    """The writes of a forward pass, whose calls run in this order.

    `conditions`: the inputs that stay for a while. What depends on them alone is computed first.
    """

    def __init__(self, nodes: list[Node], graph: Graph, conditions: frozenset[str]):
        self.values = graph.values
        self.places = {id(node): place for place, node in enumerate(nodes)}
        self.last_reads: dict[int, int] = {}
        for place, node in enumerate(nodes):
            self.last_reads.update(dict.fromkeys(node.uses(), place))
        self.outputs = frozenset(graph.output_numbers())
        self.any = any(node.writes for node in nodes)
        for node in nodes:
            reason = self._unfollowed(node, graph, conditions)
            if reason:
                raise Unfollowed(f"{name_of(node.target)} {reason}")

    def _unfollowed(self, node: Node, graph: Graph, conditions: frozenset[str]) -> str:
        """Why no program follows this call, wherever its values are; empty if one may."""
        if name_of(node.target).startswith("as_strided"):
            return "reads memory in the order that it has layer by layer"
        if not node.writes:
            return ""
        if not all(isinstance(leaf, Ref) for leaf in node.writes):
            return "writes into a parameter or a buffer"
        if node.moves:
            return "changes the shape of a value in place"
        if not set(node.gives()) <= set(node.written()):
            return "writes into one value and gives another"
        inputs = [graph.values[number] for number in graph.inputs.values()]
        for number in node.written():
            written = self.values[number]
            if written.memory in [value.memory for value in inputs]:
                return "writes into an input"
            is_early = written.inputs <= conditions
            sharing = [value for value in self.values.values() if value.memory == written.memory]
            if any((value.inputs <= conditions) != is_early for value in sharing):
                return "writes into a value that is kept between calls"
        return ""

    def check(self, node: Node, views: Mapping[int, View]) -> None:
        """Refuse a write to memory that a value shares in only one of the two, and is read later.

        The two are the program, where values are these views, and the forward pass.
        """
        later = [number for number in views if self._is_read_after(number, node)]
        for number in node.written():
            if any(self._differ(number, other, views) for other in later):
                name = name_of(node.target)
                raise Unfollowed(f"{name} writes into a value that shares memory with another one")

    def _is_read_after(self, number: int, node: Node) -> bool:
        is_used = self.last_reads.get(number, -1) > self.places[id(node)]
        return is_used or number in self.outputs

    def _differ(self, one: int, other: int, views: Mapping[int, View]) -> bool:
        """Whether two values share memory in only one of the program and the forward pass."""
        is_shared = self.values[one].memory == self.values[other].memory
        return is_shared != (views[one].buffer is views[other].buffer)
