"""Lowering: a recorded forward pass becomes the steps of a program.

The walk follows the graph in order. A call that a native kernel covers (runtime/covers.py) becomes
a producer, which waits for its readers; every other call becomes a step of torch on the same
memory. What is read by a packed layer is stored as codes.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowtide.models.trace import Graph, Node, Param, Ref, leaves_of, mapped
from lowtide.nn.packed import Packed
from lowtide.runtime.draft import Draft
from lowtide.runtime.half import Widening
from lowtide.runtime.layers import NativeLayer
from lowtide.runtime.layouts import Layout, layout_of, pixel_shape, same_order
from lowtide.runtime.memory import Buffer, View, is_whole, new_view, whole_buffer
from lowtide.runtime.numbers import Numbers
from lowtide.runtime.producers import Chain, Joined, NormedRows, Product
from lowtide.runtime.steps import Step, TorchStep
from lowtide.runtime.target import CPU, Target
from lowtide.runtime.torch_calls import name_of, owner_of, returns_its_input
from lowtide.runtime.writes import Writes


@dataclass(frozen=True, eq=False)
class Returned:
    """A value that the forward pass returns, and the type that it gives it."""

    view: View
    dtype: torch.dtype


@dataclass
class Lowered:
    """The steps, and the views that a run fills before them and reads after them.

    The first `conditional` steps read the conditions alone: the timestep, a label. They give the
    features, and do not run again while the conditions stay.
    """

    steps: list[Step | TorchStep]
    conditional: int
    conditions: dict[str, View]
    inputs: dict[str, View]
    features: list[View]
    output: Any
    kept: list[Tensor]


class Lowering:
    """One walk over a graph. `covers`: what takes a call, by torch function or kind of layer.

    A cover returns the view of the call's result, or None for a call that torch must run.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: Graph,
        numbers: Numbers,
        layers: Mapping[str, NativeLayer],
        conditions: frozenset[str],
        covers: "Mapping[Callable | type, Cover]",
        target: Target = CPU,
    ):
        self.root = root
        self.graph = graph
        self.numbers = numbers
        self.layers = layers
        self.conditions = conditions
        self.covers = covers
        nodes = [node for node in graph.nodes if not returns_its_input(node)]
        self.early = list(filter(self._is_conditional, nodes))
        self.late = [node for node in nodes if not self._is_conditional(node)]
        self.draft = Draft(_readers(nodes, graph))
        # Chains that only read a view, by its place and shape, so that two layers share codes.
        self.readings: dict[Buffer, dict[tuple, Chain]] = {}
        self.kept: list[Tensor] = []
        self.target = target
        self.widening = Widening.of(root) if target.widens else Widening(frozenset())
        self.writes = Writes([*self.early, *self.late], graph, conditions)

    def lower(self) -> Lowered:
        inputs = {
            name: self._input(number)
            for name, number in self.graph.inputs.items()
            if self.draft.readers[number]
        }
        for node in self.early:
            self._lower(node)
        features = self._features()
        conditional = len(self.draft.steps)
        for node in self.late:
            self._lower(node)
        output = mapped(self.graph.output, self._finished)
        conditions = {name: view for name, view in inputs.items() if name in self.conditions}
        content = {name: view for name, view in inputs.items() if name not in self.conditions}
        steps = self.draft.steps
        return Lowered(steps, conditional, conditions, content, features, output, self.kept)

    def _input(self, number: int) -> View:
        """A fixed place for an input; images get their channels side by side."""
        value = self.graph.values[number]
        kind = self.widening.type(value.dtype)
        view = new_view(_stored(value.shape, kind), self.target.device)
        self.draft.name(number, view)
        return view

    def _is_conditional(self, node: Node) -> bool:
        """Whether a call depends on nothing but the conditions."""
        values = [self.graph.values[number] for number in [*node.uses(), *node.gives()]]
        return all(value.inputs <= self.conditions for value in values)

    def _features(self) -> list[View]:
        """What the late calls read of the early ones, in memory that stays between runs."""
        used = set(self.graph.output_numbers())
        for node in self.late:
            used.update(node.uses())
        early = sorted(used & self.draft.views.keys())
        views = [self.draft.floats(self.draft.views[number]) for number in early]
        self.draft.settle_all()
        features: list[View] = []
        for view in views:
            buffer = view.buffer
            if buffer.fixed is None:
                device = self.target.device
                memory = torch.empty(buffer.nbytes, dtype=torch.uint8, device=device)
                buffer.fixed = memory.view(view.meta.dtype)
                features.append(whole_buffer(view))
        return features

    def _finished(self, leaf: Any) -> Any:
        if not isinstance(leaf, Ref):
            return leaf
        view = self.draft.floats(self.draft.views[leaf.id])
        return Returned(view, self.graph.values[leaf.id].dtype)

    def _lower(self, node: Node) -> None:
        cover = None if node.writes else self.covers.get(self._kind(node))
        result = None if cover is None else cover(self, node)
        if result is None:
            function = self.function(node)
            is_module = isinstance(function, nn.Module)
            self.run_in_torch(node, self._layer(function) if is_module else function)
        else:
            self.draft.name(node.gives()[0], result)

    def _layer(self, module: nn.Module) -> Callable:
        """A layer as torch runs it. Its side branch is a call of its own."""
        return self.widening.layer(module) if not isinstance(module, Packed) else module.weighted

    def _kind(self, node: Node) -> Callable | type:
        """What a cover is registered for: the function of torch, or the class of the layer."""
        return type(self.function(node)) if isinstance(node.target, str) else node.target

    # What a call is given, and what it gives

    def function(self, node: Node) -> Callable:
        if isinstance(node.target, str):
            return self.root.get_submodule(node.target)
        return node.target

    def given(self, leaf: Any) -> Any:
        """A View for a value, a tensor of the model for a parameter, or the argument itself."""
        if isinstance(leaf, Ref):
            return self.draft.views[leaf.id]
        if isinstance(leaf, Param):
            owner, _, attribute = leaf.name.rpartition(".")
            return self.widening.tensor(getattr(self.root.get_submodule(owner), attribute))
        if isinstance(leaf, torch.device):
            return self.target.device
        return self.widening.argument(leaf)

    def result_shape(self, node: Node) -> tuple[int, ...]:
        return self.graph.values[node.gives()[0]].shape

    def result_type(self, node: Node) -> torch.dtype:
        return self.widening.type(self.graph.values[node.gives()[0]].dtype)

    def are_floats(self, *views: View) -> bool:
        """Whether the kernels read and store values of these types."""
        return all(view.meta.dtype in self.target.floats for view in views)

    def float32(self, leaf: Any) -> Tensor | None:
        """A parameter as contiguous float32, kept alive with the program."""
        if leaf is None:
            return None
        tensor = self.given(leaf).detach().float().contiguous()
        self.kept.append(tensor)
        return tensor

    # Calls of torch

    def run_in_torch(self, node: Node, function: Callable) -> View | None:
        """A view of what is in memory, or a step of torch. Returns the first result."""
        given = mapped((node.args, node.kwargs), self.given)
        views = [leaf for leaf in leaves_of(given) if isinstance(leaf, View)]
        if not self._is_view(node, given, views):
            self._add_torch_step(node, function, given, views)
        first = node.gives()[:1]
        return self.draft.views[first[0]] if first else None

    def _add_torch_step(
        self, node: Node, function: Callable, given: tuple[Any, Any], views: list[View]
    ) -> None:
        if node.writes:
            self.writes.check(node, self.draft.views)
            # Who reads the values as they were reads them now; codes are out of date after this.
            self.draft.settle_all()
            self.readings.clear()
        for view in views:
            self.draft.floats(view)
        changed = [self.draft.views[number] for number in node.written()]
        results: list[View] = []
        for number in node.gives() if not changed else []:
            self.draft.name(number, self._place(number))
            results.append(self.draft.views[number])
        args, kwargs = given
        name = name_of(node.target)
        if node.target is Tensor.view:
            function = Tensor.reshape
        step = TorchStep(name, function, args, kwargs, results, changed=changed, read=views)
        self.draft.steps.append(step)

    def _place(self, number: int) -> View:
        """A place for a result of torch; images get their channels side by side."""
        value = self.graph.values[number]
        kind = self.widening.type(value.dtype)
        if kind in self.target.floats:
            return new_view(_stored(value.shape, kind))
        return new_view(torch.empty(value.shape, dtype=kind, device="meta"))

    def _is_view(self, node: Node, given: tuple[Any, Any], views: list[View]) -> bool:
        """Name the results if the call only gives views of its arguments."""
        if isinstance(node.target, str) or node.writes or not views:
            return False
        args, kwargs = mapped(given, _on_meta)
        try:
            results = leaves_of(node.target(*args, **kwargs))
        except RuntimeError:  # a `view` of what lies in another order here
            return False
        pairs = zip(leaves_of(node.output), results, strict=True)
        named = [(leaf.id, result) for leaf, result in pairs if isinstance(leaf, Ref)]
        owned = [(number, result, owner_of(result, views)) for number, result in named]
        shared = [(number, View(owner.buffer, result)) for number, result, owner in owned if owner]
        if not shared or len(shared) < len(named):
            return False
        for number, view in shared:
            self.draft.name(number, view)
        return True

    # What waits behind a view

    def product(self, view: View) -> Product | None:
        """The product behind this view, if nobody else reads it and the view is all of it."""
        product = self.draft.waiting.get(view.buffer)
        alone = is_whole(view) and self.draft.is_read_once(view.buffer)
        return product if isinstance(product, Product) and alone else None

    def rows(self, view: View) -> NormedRows | None:
        """The layer norm behind this view, if the view has all of its rows and samples."""
        rows = self.draft.waiting.get(view.buffer)
        if not isinstance(rows, NormedRows) or not is_whole(view) or not view.meta.is_contiguous():
            return None
        layout = rows.layout
        is_alike = (view.shape[0], view.shape[-1]) == (layout.batch, layout.channels)
        return rows if is_alike else None

    def chain(self, view: View) -> Chain | None:
        """The chain that will compute this view; a new chain that only reads it, if none will."""
        return self.waiting_chain(view) or self.reading(view)

    def waiting_chain(self, view: View) -> Chain | None:
        """The chain that waits behind this view, if the view is all of it."""
        chain = self.draft.waiting.get(view.buffer)
        if not isinstance(chain, Chain) or not is_whole(view):
            return None
        whole = self.draft.wholes[view.buffer]
        lines = [layout.as_line() for layout in chain.layouts]
        is_reshaped = chain.is_unshaped and None not in lines
        is_alike = view.shape == whole.shape or is_reshaped
        return chain if is_alike and same_order(view.meta, whole.meta) else None

    def reading(self, view: View) -> Chain | None:
        """A chain that only reads; views with the same pixels share it."""
        key = (view.meta.storage_offset(), tuple(view.shape), view.meta.stride())
        known = self.readings.setdefault(view.buffer, {})
        if key not in known:
            sources = self.sources(view)
            if sources is None:
                return None
            known[key] = Chain(*sources)
        return known[key]

    def sources(self, view: View) -> tuple[list[View], list[Layout]] | None:
        """The values to read and where their pixels are: two for values that wait side by side."""
        joined = self.draft.waiting.get(view.buffer)
        parts = [view]
        if isinstance(joined, Joined) and self._is_unchanged(view):
            parts = joined.parts
        layouts = [layout_of(part.meta) for part in parts]
        found = [layout for layout in layouts if layout is not None]
        alike = len({part.meta.dtype for part in parts}) == 1 and self.are_floats(*parts)
        return (parts, found) if alike and len(found) == len(parts) else None

    def _is_unchanged(self, view: View) -> bool:
        """Whether the view has the shape and the strides of the value as it was made."""
        whole = self.draft.wholes[view.buffer]
        return view.shape == whole.shape and same_order(view.meta, whole.meta)


Cover = Callable[[Lowering, Node], View | None]


def _readers(nodes: list[Node], graph: Graph) -> Counter[int]:
    """How many calls read each value; the caller of the forward pass reads the output."""
    readers = Counter(graph.output_numbers())
    for node in nodes:
        readers.update(node.uses())
    return readers


def _stored(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """How a value is stored: without gaps, images with their channels side by side."""
    if len(shape) != 4:
        return torch.empty(shape, dtype=dtype, device="meta")
    batch, channels, height, width = shape
    return pixel_shape(batch, height, width, channels, dtype)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, View):
        return leaf.meta
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    return leaf.to("meta") if isinstance(leaf, Tensor) else leaf
